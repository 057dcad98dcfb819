-- SPDX-License-Identifier: Apache-2.0
-- pool: runs once a server is chosen, for models that it knows by another name than the caller does. Writes the
-- server's name for the model into the body. Again for each attempt: the next one may go to a server that has
-- yet another name for it.
--
-- If this script fails, Envoy skips it and counts lua.errors; the server then says that it has no such model.

local shape = require('envoy.lua.shape')

local NAME = 'x-peaje-engine-model'

function envoy_on_request(handle)
  local headers = handle:headers()
  local name = headers:get(NAME)
  headers:remove(NAME)
  local body = name and handle:body()
  local renamed = body and shape.rename(body:getBytes(0, body:length()), name)
  if renamed then body:setBytes(renamed) end
end
