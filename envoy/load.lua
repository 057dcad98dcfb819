-- SPDX-License-Identifier: Apache-2.0
-- load: runs once a server has answered, for pools with `balance: orca`. Completes the load report of an engine that
-- says how full it is and not how much it does: Envoy drops a report without a rate in silence.
--
-- The rate is then the same for all, so a server's weight is how empty it is.
--
-- If this script fails, Envoy skips it and counts lua.errors; the report is then as the engine wrote it.

local report = require('envoy.lua.report')

local REPORT = 'endpoint-load-metrics'

function envoy_on_response(handle)
  local headers = handle:headers()
  local completed = report.complete(headers:get(REPORT))
  if completed then headers:replace(REPORT, completed) end
end
