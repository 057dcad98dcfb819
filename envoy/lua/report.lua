-- SPDX-License-Identifier: Apache-2.0
-- What an engine's load report lacks for Envoy to weigh it. Pure: text in, text out.

local M = {}

-- A server that says 0 would be infinitely better than all others.
local LEAST = 0.01
-- Of a report; a longer one is no engine's.
local LENGTH_MAX = 4096

local function number(report, name)
  -- A name ends where another begins: `x.kv_cache_usage_perc` is not `kv_cache_usage_perc`.
  return tonumber(string.match(',' .. report, '[%s,]' .. name .. '%s*=%s*([^%s,]+)'))
end

-- The report with a rate and a utilization, from what vLLM says of itself; nil where nothing is to be added: another
-- format than TEXT, a report that is whole, or one that says nothing that we know.
function M.complete(report)
  local format, said = string.match(report or '', '^(%u+)%s+(.*)$')
  if format ~= 'TEXT' or #report > LENGTH_MAX or number(said, 'rps_fractional') then return nil end
  local utilization = number(said, 'application_utilization') or number(said, 'cpu_utilization')
  if utilization then return report .. ', rps_fractional=1' end
  local used = number(said, 'named_metrics%.kv_cache_usage_perc')
  if not used then return nil end
  local waiting = number(said, 'named_metrics%.num_requests_waiting') or 0
  -- Where requests wait there is no room, whatever the cache says.
  if waiting > 0 then used = 1 end
  if not (used >= LEAST) then used = LEAST end
  return report .. string.format(', application_utilization=%.4f, rps_fractional=1', used)
end

return M
