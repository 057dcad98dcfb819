-- SPDX-License-Identifier: Apache-2.0
-- gate: the first thing a request meets. Reads the body once, writes what decisions depend on
-- to the metadata namespace peaje.request, and refuses what no service needs to see:
-- unknown paths, wrong methods, no credential, bodies that two parsers could read differently.
--
-- If this script fails, Envoy skips it and counts lua.errors; then peaje.request is missing
-- and extauth refuses: a broken gate closes the road.

local request = require('envoy.lua.request')
local reply = require('envoy.lua.reply')

local NAMESPACE = 'peaje.request'

-- The route allow-list. A path without a meter does not exist.
local DIALECTS = {
  ['/v1/chat/completions'] = 'openai.chat',
  ['/v1/completions'] = 'openai.completions',
  ['/v1/embeddings'] = 'openai.embeddings',
  ['/v1/responses'] = 'openai.responses',
  ['/v1/messages'] = 'anthropic.messages',
  ['/v1/models'] = 'openai.models',
}

local function refuse(handle, dialect, denial)
  local id = handle:headers():get('x-request-id') or ''
  local headers, body = reply.refusal(dialect, denial, id)
  handle:respond(headers, body)
end

-- Seconds since 1970 with microseconds, as text. Every record of this exchange carries it: it is
-- half of the row's key, so it must not differ between records.
local function stamp(handle)
  local micros = handle:timestampString(EnvoyTimestampResolution.MICROSECOND)
  return string.sub(micros, 1, -7) .. '.' .. string.sub(micros, -6)
end

local function publish(handle, facts, dialect, prompt_bytes, started_at)
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set(NAMESPACE, 'started_at', started_at)
  metadata:set(NAMESPACE, 'dialect', dialect)
  metadata:set(NAMESPACE, 'model', facts.model)
  metadata:set(NAMESPACE, 'stream', facts.stream)
  metadata:set(NAMESPACE, 'wants_usage', facts.wants_usage)
  metadata:set(NAMESPACE, 'shape', facts.shape)
  -- Rate limit descriptors carry strings only.
  metadata:set(NAMESPACE, 'prompt_bytes', tostring(prompt_bytes))
  metadata:set(NAMESPACE, 'output_tokens_max', tostring(facts.output_tokens_max))
  metadata:set(NAMESPACE, 'choices', tostring(facts.choices))
end

local MODELS_FACTS = {
  model = '', stream = false, wants_usage = 'no', shape = 'no', output_tokens_max = 0, choices = 0,
}

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = string.match(headers:get(':path') or '', '^[^?#]*')
  if path == '/health' then return end
  local dialect = DIALECTS[path]
  if not dialect then
    return refuse(handle, 'openai', { status = 404, code = 'not_found', message = 'Unknown path.' })
  end
  local started_at = stamp(handle)
  local method = dialect == 'openai.models' and 'GET' or 'POST'
  if headers:get(':method') ~= method then
    return refuse(handle, dialect, {
      status = 405, code = 'invalid_request', message = 'Use ' .. method .. ' here.', allow = method,
    })
  end
  if not headers:get('authorization') and not headers:get('x-api-key') then
    return refuse(handle, dialect, {
      status = 401, code = 'missing_credential',
      message = 'No API key was sent. Send it as "authorization: Bearer KEY" or "x-api-key: KEY".',
    })
  end
  if dialect == 'openai.models' then
    publish(handle, MODELS_FACTS, dialect, 0, started_at)
    handle:clearRouteCache()
    return
  end
  local encoding = headers:get('content-encoding')
  if encoding and encoding ~= 'identity' then
    return refuse(handle, dialect, {
      status = 415, code = 'unsupported_encoding', message = 'Send the body without content-encoding.',
    })
  end

  local buffered = handle:body()
  local length = buffered and buffered:length() or 0
  if length == 0 then
    return refuse(handle, dialect, { status = 400, code = 'invalid_request', message = 'The body is empty.' })
  end
  local facts, denial = request.read(buffered:getBytes(0, length), dialect)
  if not facts then return refuse(handle, dialect, denial) end
  publish(handle, facts, dialect, length, started_at)
  -- The route (which model, which pool) is chosen by this metadata.
  handle:clearRouteCache()
end
