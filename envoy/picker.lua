-- SPDX-License-Identifier: Apache-2.0
-- picker: asks the endpoint picker of a pool which of its servers a request goes to. Runs only on routes to pools that
-- have one; what each asks is the route's filter context, built from models.yaml:
--   cluster, host        where the picker is
--   among                addresses of the pool's servers, where they are known
--   when_away            "open": the pool's own balancing chooses; "close": 503
--
-- The body does not leave Envoy for the call: a picker reads a copy, and what it hands back of it is not looked at. It
-- can name servers or refuse, and nothing else; Envoy takes a server of the pool and passes over any other.
--
-- If this script fails, Envoy skips it and counts lua.errors; the pool's own balancing chooses then.

local picking = require('envoy.lua.picking')
local reply = require('envoy.lua.reply')

local REQUEST = 'peaje.request'
local PICKED = 'envoy.lb'

-- For the whole call: a picker looks at tables in its memory. One that hangs costs each request this long until Envoy
-- leaves it out.
local WITHIN_MS = 1000

local function refuse(handle, status)
  local request = handle:streamInfo():dynamicMetadata():get(REQUEST) or {}
  local headers, body = reply.refusal(request.dialect, {
    status = status, code = 'upstream_unavailable', message = 'The model servers have no room for this request. Try again.',
  }, handle:headers():get('x-request-id') or '')
  headers['retry-after'] = '1'
  handle:respond(headers, body)
end

function envoy_on_request(handle)
  -- All that is read before the body: taking it is a yield, after which these wrappers are dead.
  local context, told = handle:filterContext(), {}
  local cluster, host, among = context:get('cluster'), context:get('host'), context:get('among')
  local is_open = context:get('when_away') == 'open'
  for name, value in pairs(handle:headers()) do
    if picking.is_told(name) then told[#told + 1] = { name, value } end
  end
  local body = handle:body()
  local message = picking.ask(told, body:getBytes(0, body:length()), among)
  local headers, said = handle:httpCall(cluster, {
    [':method'] = 'POST', [':path'] = '/envoy.service.ext_proc.v3.ExternalProcessor/Process', [':authority'] = host,
    ['content-type'] = 'application/grpc', te = 'trailers',
  }, message, WITHIN_MS)

  local answer = headers[':status'] == '200' and said and picking.answer(said) or nil
  if type(answer) == 'string' then
    handle:streamInfo():dynamicMetadata():set(PICKED, 'x-gateway-destination-endpoint', answer)
  elseif type(answer) == 'number' then
    refuse(handle, answer == 429 and 429 or 503)
  elseif not is_open then
    refuse(handle, 503)
  end
end
