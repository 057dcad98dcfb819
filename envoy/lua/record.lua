-- SPDX-License-Identifier: Apache-2.0
-- The last thing before a request goes to a model server: it is written to the journal, or it may not
-- pass; then the engine is asked for usage where a splice can. Done by the gate on the express lane,
-- by the tap otherwise.

local journal = require('envoy.lua.journal')
local reply = require('envoy.lua.reply')
local shape = require('envoy.lua.shape')

local M = {}

-- One life of this Envoy process; whoever starts Envoy names it.
local EPOCH = os.getenv('PEAJE_ENVOY_EPOCH') or ''

-- Write the start record; when it cannot be written, refuse the request and say false.
function M.start(handle, request_id, identity, request, admission)
  if journal.start(request_id, identity, request, admission, EPOCH) then return true end
  handle:logErr('the journal cannot be written: the request is refused')
  handle:respond(reply.refusal(request.dialect, {
    status = 503, code = 'service_unavailable', message = 'The gateway cannot record this request. Try again.',
  }, request_id))
  return false
end

-- Whether the request has to be changed here.
function M.needs_shape(request)
  return request.shape == shape.INSERT or request.shape == shape.REPLACE
end

-- Ask for usage in the body; can_run: whether the pool's engine sends running usage.
function M.ask_for_usage(body, text, how, can_run)
  local instead = shape.ask_for_usage(text, how, can_run)
  if instead then body:setBytes(instead) end
end

return M
