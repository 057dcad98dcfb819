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

-- Whether the request has to be changed here. cap: output tokens promised to a hard limit, or nil.
function M.needs_shape(request, cap)
  return cap ~= nil or request.shape == shape.INSERT or request.shape == shape.REPLACE
end

-- Change the body: ask for usage (can_run: whether the pool's engine sends running usage) and hold to the cap.
function M.shape(body, text, request, can_run, cap)
  local instead = shape.ask_for_usage(text, request.shape, can_run)
  local capped = cap and shape.cap_output(instead or text, request.dialect, cap)
  if capped or instead then body:setBytes(capped or instead) end
end

return M
