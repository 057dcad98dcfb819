-- SPDX-License-Identifier: Apache-2.0
-- tap: the last filter before the model server, so it sees only admitted requests. Writes the
-- journal's start record; what cannot be recorded may not pass. Answers GET /v1/models with what
-- extauth said this caller may use, asks the engine for usage where a splice can, and holds it to the
-- output that ratelimit promised to a hard limit.
-- On the express lane the gate has done all this and this filter is skipped.
--
-- If this script fails, Envoy skips it and counts lua.errors; the row then has no start record of
-- ours and stands on Envoy's end record.

local record = require('envoy.lua.record')

local REQUEST = 'peaje.request'
local IDENTITY = 'envoy.filters.http.ext_authz'
local ADMISSION = 'envoy.filters.http.ratelimit'
local USAGE = 'peaje.usage'

function envoy_on_request(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local request = metadata:get(REQUEST)
  if not request then return end
  metadata:set(USAGE, 'total', 0)
  metadata:set(USAGE, 'seen', 'none')
  local identity = metadata:get(IDENTITY) or {}
  if request.dialect == 'openai.models' then
    handle:respond({ [':status'] = '200', ['content-type'] = 'application/json' }, identity.models_body)
    return
  end
  local id = handle:headers():get('x-request-id')
  local admission = metadata:get(ADMISSION) or {}
  if not record.start(handle, id, identity, request, admission) then return end
  local cap = admission.output_tokens_cap
  if record.needs_shape(request, cap) then
    -- Read first: taking the body is a yield, after which this wrapper is dead. The gate has read the
    -- body, so this waits for nobody.
    local can_run = handle:metadata():get('running_usage')
    local body = handle:body()
    record.shape(body, body:getBytes(0, body:length()), request, can_run, cap)
  end
end
