-- SPDX-License-Identifier: Apache-2.0
-- Read an answer as it passes: usage into the metadata namespace peaje.usage, hiding what the caller
-- did not ask for. The moving part; what the bytes mean is usage.lua's.

local usage = require('envoy.lua.usage')

local M = {}

local REQUEST = 'peaje.request'
local USAGE = 'peaje.usage'

-- Dialects in which the caller can ask for usage, and so can also not have asked.
local HIDES = { ['openai.chat'] = true, ['openai.completions'] = true }

-- What is counted besides tokens, and where: in the answer, or in the request, which says it all.
local METERS = { ['openai.images'] = 'images', ['rerank'] = 'searches' }
local METERED_BY_REQUEST = { ['openai.speech'] = true }

-- Tell what is new: each set costs as much as reading a frame does.
local function publish(handle, reader, told)
  local metadata = handle:streamInfo():dynamicMetadata()
  local counts = reader.counts
  local function tell(name, value)
    if value ~= nil and told[name] ~= value then
      told[name] = value
      metadata:set(USAGE, name, value)
    end
  end
  tell('input', counts.input)
  tell('output', counts.output)
  tell('cached', counts.cached)
  tell('reasoning', counts.reasoning)
  tell('quantity', reader.quantity)
  -- What settles with ratelimit when the stream is done; on the express lane nobody is told.
  if told.total then tell('total', usage.total(reader)) end
  tell('seen', reader.seen)
  tell('anomaly', reader.anomaly)
  -- Where the engine's counts cannot be used, the frames stand in.
  if reader.seen == 'none' or (counts.output or 0) < 0 then tell('frames', reader.frames) end
end

local function kind_of(headers)
  local content_type = string.lower(headers:get('content-type') or '')
  if string.find(content_type, 'text/event-stream', 1, true) then return 'events' end
  if string.find(content_type, 'json', 1, true) then return 'object' end
  return nil
end

local function follow(handle, reader, told)
  local frames = 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      local readings = reader.readings
      local instead = reader:feed(chunk:getBytes(0, length))
      if instead then chunk:setBytes(instead) end
      -- Wrappers from before a piece are dead; the metadata is fetched afresh each time.
      if reader.readings ~= readings or reader.anomaly or (reader.seen == 'none' and reader.frames ~= frames) then
        frames = reader.frames
        publish(handle, reader, told)
      end
    end
  end
  -- Read to its end without a word: that is told as well.
  if reader.seen == 'none' and frames == 0 then publish(handle, reader, told) end
end

-- Read the answer of an admitted request; nil for any other. Returns the tokens read, at its end.
function M.read(handle, request, metadata)
  local headers = handle:headers()
  local status = tonumber(headers:get(':status'))
  if status < 200 or status > 299 then return 0 end
  local kind = kind_of(headers)
  if METERED_BY_REQUEST[request.dialect] then
    metadata:set(USAGE, 'quantity', tonumber(request.quantity))
    -- Sound is no usage; only a stream of events has some at its end.
    if kind ~= 'events' then return 0 end
  end
  local encoding = headers:get('content-encoding')
  if not kind or (encoding and encoding ~= 'identity') then
    metadata:set(USAGE, 'anomaly', kind and 'encoded' or 'unreadable')
    -- What was asked for stands in, with the budget as on the bill.
    if METERS[request.dialect] == 'images' then metadata:set(USAGE, 'quantity', tonumber(request.quantity)) end
    return 0
  end
  local reader = usage.reader(kind, HIDES[request.dialect] and (request.wants_usage or 'no') or 'running', METERS[request.dialect])
  if kind == 'events' and reader.hides then headers:remove('content-length') end
  follow(handle, reader, { seen = 'none', total = not request.express and 0 or nil })
  return usage.total(reader)
end

return M
