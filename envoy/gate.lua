-- SPDX-License-Identifier: Apache-2.0
-- gate: the first thing a request meets, and the last its answer passes. Reads the body once, writes
-- what decisions depend on to the metadata namespace peaje.request, and refuses what no service needs
-- to see: unknown paths, wrong methods, no credential, bodies that two parsers could read differently.
--
-- Where this worker remembers the decision (envoy/lua/lane.lua) it does the tap's work as well and marks
-- the request `express`; envoy.yaml then skips extauth, ratelimit and tap. Where it only remembers who is
-- calling, it marks the request `recognised`, and extauth is skipped.
--
-- On the way back it reads token usage from each piece into peaje.usage (the journal's periodic
-- records carry it, so a cut stream is billed to the last piece), and hides what was not asked for.
--
-- If the request's script fails, Envoy skips it and counts lua.errors; then peaje.request is missing
-- and extauth refuses: a broken gate closes the road. If the answer's fails, the journal has no usage
-- and the collector bills by estimate, flagged.

local affinity = require('envoy.lua.affinity')
local answer = require('envoy.lua.answer')
local express = require('envoy.lua.express')
local reply = require('envoy.lua.reply')
local request = require('envoy.lua.request')

local NAMESPACE = 'peaje.request'
local USAGE = 'peaje.usage'

-- The route allow-list. A path without a meter does not exist.
local DIALECTS = {
  ['/v1/chat/completions'] = 'openai.chat',
  ['/v1/completions'] = 'openai.completions',
  ['/v1/embeddings'] = 'openai.embeddings',
  ['/v1/responses'] = 'openai.responses',
  ['/v1/messages'] = 'anthropic.messages',
  ['/v1/models'] = 'openai.models',
  ['/v1/rerank'] = 'rerank',
  ['/v1/images/generations'] = 'openai.images',
  ['/v1/audio/speech'] = 'openai.speech',
}

-- Paths that a caller of the dialects above may expect, and why they are not there (docs/decisions/0025, 0036).
local FORM = 'Not served here: the request is a form and not JSON, and what it uses could not be metered.'
local SESSION = 'Not served here: a WebSocket has no end of an answer, and what it uses could not be metered.'
local COUNT = 'Not served here: an answer that only counts tokens has no usage, and could not be metered.'
local UNMETERED = {
  ['^/v1/audio/'] = FORM, ['^/v1/images/'] = FORM, ['^/v1/realtime'] = SESSION,
  ['^/v1/messages/count_tokens$'] = COUNT, ['^/v1/responses/input_tokens$'] = COUNT,
}

local function unknown(path)
  for pattern, reason in pairs(UNMETERED) do
    if string.find(path, pattern) then return reason end
  end
  return 'Unknown path.'
end

local function refuse(handle, dialect, denial)
  local id = handle:headers():get('x-request-id') or ''
  local headers, body = reply.refusal(dialect, denial, id)
  handle:respond(headers, body)
end

-- What is as in most requests is not said, for each set costs as much as reading a small request does: no stream,
-- nothing said of usage, of output and of choices, nothing to shape.
local function publish(handle, facts)
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set(NAMESPACE, 'started_at', facts.started_at)
  metadata:set(NAMESPACE, 'dialect', facts.dialect)
  metadata:set(NAMESPACE, 'model', facts.model)
  -- Rate limit descriptors carry strings only.
  metadata:set(NAMESPACE, 'prompt_bytes', tostring(facts.prompt_bytes))
  if facts.stream then metadata:set(NAMESPACE, 'stream', true) end
  if facts.wants_usage ~= 'no' then metadata:set(NAMESPACE, 'wants_usage', facts.wants_usage) end
  if facts.shape ~= 'no' then metadata:set(NAMESPACE, 'shape', facts.shape) end
  if facts.output_tokens_max > 0 then metadata:set(NAMESPACE, 'output_tokens_max', tostring(facts.output_tokens_max)) end
  if facts.choices > 1 then metadata:set(NAMESPACE, 'choices', tostring(facts.choices)) end
  if facts.quantity then metadata:set(NAMESPACE, 'quantity', tostring(facts.quantity)) end
end

-- Choose the route (which model, which pools) by what was published, and do what it says of its model: an alias
-- becomes the model's own name, which is the only one that decisions and records know. Returns a refusal, or nil.
local function choose(handle, facts, text)
  handle:clearRouteCache()
  -- Envoy gives a script the metadata of one route only; an alias' route says all that its model's does.
  local about = handle:metadata()
  -- Numbers come as text.
  local model, most, prefix_bytes = about:get('model'), about:get('output_tokens_max'), about:get('prefix_bytes')
  if model then
    facts.model = model
    handle:streamInfo():dynamicMetadata():set(NAMESPACE, 'model', model)
    handle:clearRouteCache()
  end
  most = most and tonumber(most)
  if most and facts.output_tokens_max > most then
    return {
      status = 400, code = 'invalid_request',
      message = 'This model generates at most ' .. string.format('%d', most) .. ' tokens.',
    }
  end
  if prefix_bytes then
    handle:headers():replace('x-peaje-prefix', affinity.prefix(text, facts.prompt_at, tonumber(prefix_bytes)))
  end
end

local MODELS_FACTS = {
  model = '', stream = false, wants_usage = 'no', shape = 'no', output_tokens_max = 0, choices = 0, prompt_bytes = 0,
}

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = string.match(headers:get(':path') or '', '^[^?#]*')
  if path == '/health' then return end
  local dialect = DIALECTS[path]
  if not dialect then
    local spoken = string.find(path, '^/v1/messages/') and 'anthropic.messages' or 'openai'
    return refuse(handle, spoken, { status = 404, code = 'not_found', message = unknown(path) })
  end
  local method = dialect == 'openai.models' and 'GET' or 'POST'
  if headers:get(':method') ~= method then
    return refuse(handle, dialect, {
      status = 405, code = 'invalid_request', message = 'Use ' .. method .. ' here.', allow = method,
    })
  end
  -- Seconds since 1970 with microseconds, as text. Every record of this exchange carries it: it is
  -- half of the row's key, so it must not differ between records.
  local micros = handle:timestampString(EnvoyTimestampResolution.MICROSECOND)
  local started_at = string.sub(micros, 1, -7) .. '.' .. string.sub(micros, -6)
  local bearer, plain = headers:get('authorization'), headers:get('x-api-key')
  -- A client certificate that Envoy has verified is a credential too; extauth knows whose.
  local tls = handle:streamInfo():downstreamSslConnection()
  local has_certificate = tls ~= nil and tls:peerCertificateValidated()
  if has_certificate then
    -- Envoy itself tells extauth the first name only.
    local names = {}
    for _, name in ipairs(tls:uriSanPeerCertificate()) do names[#names + 1] = name end
    for _, name in ipairs(tls:dnsSansPeerCertificate()) do names[#names + 1] = name end
    handle:streamInfo():dynamicMetadata():set(NAMESPACE, 'certificate_names', names)
  end
  if not bearer and not plain and not has_certificate then
    return refuse(handle, dialect, {
      status = 401, code = 'missing_credential',
      message = 'No API key was sent. Send it as "authorization: Bearer KEY" or "x-api-key: KEY".',
    })
  end
  if dialect == 'openai.models' then
    MODELS_FACTS.dialect, MODELS_FACTS.started_at = dialect, started_at
    publish(handle, MODELS_FACTS)
    handle:clearRouteCache()
    return
  end
  local encoding = headers:get('content-encoding')
  if encoding and encoding ~= 'identity' then
    return refuse(handle, dialect, {
      status = 415, code = 'unsupported_encoding', message = 'Send the body without content-encoding.',
    })
  end
  -- What one header may hold twice, two headers or a header and a certificate differently, extauth judges each time.
  local credential = nil
  if not has_certificate then
    if not plain and headers:getNumValues('authorization') == 1 then credential = bearer end
    if not bearer and headers:getNumValues('x-api-key') == 1 then credential = 'x-api-key ' .. plain end
  end
  local request_id = headers:get('x-request-id')

  local buffered = handle:body()
  local length = buffered and buffered:length() or 0
  if length == 0 then
    return refuse(handle, dialect, { status = 400, code = 'invalid_request', message = 'The body is empty.' })
  end
  local text = buffered:getBytes(0, length)
  local facts, denial = request.read(text, dialect)
  if not facts then return refuse(handle, dialect, denial) end
  facts.dialect, facts.started_at, facts.prompt_bytes = dialect, started_at, length + (facts.repeated_bytes or 0)
  publish(handle, facts)
  denial = choose(handle, facts, text)
  if denial then return refuse(handle, dialect, denial) end
  express.try(handle, facts, credential, request_id, tonumber(string.sub(micros, 1, -4)), buffered, text)
end

-- What may fail without harm: the answer is metered all the same.
local function apart(handle, what, ...)
  local is_done, reason = pcall(what, handle, ...)
  if not is_done then handle:logErr('the express lane: ' .. tostring(reason)) end
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local request = metadata:get(NAMESPACE)
  if not request then return end
  if request.asked then apart(handle, express.remember, request, metadata) end
  -- No usage namespace: refused before the tap, nothing was generated.
  if not metadata:get(USAGE) or request.dialect == 'openai.models' then return end
  if request.express then apart(handle, express.tell, request) end
  local used = answer.read(handle, request, metadata)
  if request.express then express.settle(request, used) end
end
