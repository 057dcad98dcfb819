-- SPDX-License-Identifier: Apache-2.0
-- tap: the last filter before the model server, so it sees only admitted requests. Writes the
-- journal's start record; what cannot be recorded may not pass. Answers GET /v1/models with
-- what extauth said this caller may use, asks the engine for usage where a splice can, reads token
-- usage from each piece of the answer into the metadata namespace peaje.usage (the journal's periodic
-- records carry it, so a cut stream is billed to the last piece), and hides what was not asked for.
--
-- If this script fails, Envoy skips it for that answer and counts lua.errors; the journal then
-- has no usage and the collector bills by estimate, flagged.

local journal = require('envoy.lua.journal')
local reply = require('envoy.lua.reply')
local shape = require('envoy.lua.shape')
local usage = require('envoy.lua.usage')

local REQUEST = 'peaje.request'
local IDENTITY = 'envoy.filters.http.ext_authz'
local ADMISSION = 'envoy.filters.http.ratelimit'
local USAGE = 'peaje.usage'
-- One life of this Envoy process; whoever starts Envoy names it.
local EPOCH = os.getenv('PEAJE_ENVOY_EPOCH') or ''

-- Dialects in which the caller can ask for usage, and so can also not have asked.
local HIDES = { ['openai.chat'] = true, ['openai.completions'] = true }

-- The body has been read by the gate, so this waits for nobody.
local function ask_for_usage(handle, how)
  -- Read first: taking the body is a yield, after which this wrapper is dead.
  local can_run = handle:metadata():get('running_usage')
  local body = handle:body()
  local instead = body and shape.ask_for_usage(body:getBytes(0, body:length()), how, can_run)
  if instead then body:setBytes(instead) end
end

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
  if not journal.start(id, identity, request, metadata:get(ADMISSION) or {}, EPOCH) then
    handle:logErr('the journal cannot be written: the request is refused')
    handle:respond(reply.refusal(request.dialect, {
      status = 503, code = 'service_unavailable', message = 'The gateway cannot record this request. Try again.',
    }, id))
    return
  end
  if request.shape == shape.INSERT or request.shape == shape.REPLACE then ask_for_usage(handle, request.shape) end
end

local function publish(handle, reader)
  local metadata = handle:streamInfo():dynamicMetadata()
  local counts = reader.counts
  if counts.input then metadata:set(USAGE, 'input', counts.input) end
  if counts.output then metadata:set(USAGE, 'output', counts.output) end
  if counts.cached then metadata:set(USAGE, 'cached', counts.cached) end
  if counts.reasoning then metadata:set(USAGE, 'reasoning', counts.reasoning) end
  metadata:set(USAGE, 'total', usage.total(reader))
  metadata:set(USAGE, 'seen', reader.seen)
  if reader.anomaly then metadata:set(USAGE, 'anomaly', reader.anomaly) end
  -- Where the engine's counts cannot be used, the frames stand in.
  if reader.seen == 'none' or (counts.output or 0) < 0 then metadata:set(USAGE, 'frames', reader.frames) end
end

local function kind_of(headers)
  local content_type = string.lower(headers:get('content-type') or '')
  if string.find(content_type, 'text/event-stream', 1, true) then return 'events' end
  if string.find(content_type, 'json', 1, true) then return 'object' end
  return nil
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local metadata = handle:streamInfo():dynamicMetadata()
  local request = metadata:get(REQUEST)
  -- No usage namespace: refused before the tap, nothing was generated.
  if not request or not metadata:get(USAGE) or request.dialect == 'openai.models' then return end
  local status = tonumber(headers:get(':status'))
  if status < 200 or status > 299 then return end
  local kind = kind_of(headers)
  local encoding = headers:get('content-encoding')
  if not kind or (encoding and encoding ~= 'identity') then
    metadata:set(USAGE, 'anomaly', kind and 'encoded' or 'unreadable')
    return
  end
  local reader = usage.reader(kind, HIDES[request.dialect] and request.wants_usage or 'running')
  if kind == 'events' and reader.hides then headers:remove('content-length') end

  local frames = 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      local readings = reader.readings
      local instead = reader:feed(chunk:getBytes(0, length))
      if instead then chunk:setBytes(instead) end
      if reader.readings ~= readings or reader.anomaly then
        publish(handle, reader)
      elseif reader.seen == 'none' and reader.frames ~= frames then
        -- Wrappers from before the last piece are dead; fetch the metadata afresh each time.
        frames = reader.frames
        handle:streamInfo():dynamicMetadata():set(USAGE, 'frames', frames)
      end
    end
  end
end
