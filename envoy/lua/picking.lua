-- SPDX-License-Identifier: Apache-2.0
-- The endpoint picker protocol (Gateway API Inference Extension, proposal 004) as bytes: one call of ext_proc's Process
-- with all that Envoy has to say, and what the picker said. Pure: values in, values out.
--
-- Written out here because a call needs six messages of protobuf, and Envoy's Lua knows none.

local M = {}

-- Bytes of the body in one message; gRPC servers take 4 MiB by default.
local PIECE = 262144
local NS_PICKED, PICKED = 'envoy.lb', 'x-gateway-destination-endpoint'
local NS_AMONG, AMONG = 'envoy.lb.subset_hint', 'x-gateway-destination-endpoint-subset'
-- Never told: credentials, our own names, what is about this connection and not about the request.
local UNTOLD = {
  authorization = true, ['x-api-key'] = true, cookie = true, ['proxy-authorization'] = true,
  connection = true, ['transfer-encoding'] = true,
}

local function varint(number)
  local bytes = {}
  while number >= 128 do
    bytes[#bytes + 1] = string.char(number % 128 + 128)
    number = math.floor(number / 128)
  end
  bytes[#bytes + 1] = string.char(number)
  return table.concat(bytes)
end

-- A field that holds bytes, text or a message.
local function held(number, content)
  return varint(number * 8 + 2) .. varint(#content) .. content
end

local function flag(number)
  return varint(number * 8) .. '\1'
end

local function framed(message)
  local length = #message
  return string.char(
    0, math.floor(length / 16777216) % 256, math.floor(length / 65536) % 256, math.floor(length / 256) % 256, length % 256
  ) .. message
end

-- google.protobuf.Struct with one list of texts.
local function list(name, values)
  local items = {}
  for _, value in ipairs(values) do items[#items + 1] = held(1, held(3, value)) end
  return held(1, held(1, name) .. held(2, held(6, table.concat(items))))
end

-- Whether a header of the request is told to a picker.
function M.is_told(name)
  return not UNTOLD[name] and not string.find(name, '^x%-peaje%-') and not string.find(name, '^x%-gateway%-destination%-')
end

-- The call's body: headers (a list of {name, value}), the request's body, and among which servers may be chosen.
function M.ask(headers, body, among)
  local told = {}
  for _, header in ipairs(headers) do told[#told + 1] = held(1, held(1, header[1]) .. held(3, header[2])) end
  local context = ''
  if among and #among > 0 then context = held(8, held(1, held(1, NS_AMONG) .. held(2, list(AMONG, among)))) end
  local messages = { framed(held(2, held(1, table.concat(told))) .. context) }
  for from = 1, #body, PIECE do
    local piece = string.sub(body, from, from + PIECE - 1)
    local last = from + PIECE > #body and flag(2) or ''
    messages[#messages + 1] = framed(held(4, held(1, piece) .. last) .. context)
  end
  return table.concat(messages)
end

-- Reads a varint at `from`: its value and what comes after; nil where there is none.
local function number_at(text, from)
  local value, scale = 0, 1
  for at = from, from + 9 do
    local byte = string.byte(text, at)
    if not byte then return nil end
    value, scale = value + byte % 128 * scale, scale * 128
    if byte < 128 then return value, at + 1 end
  end
end

-- The last content of a message's field, as protobuf reads one that is there twice; nil if it is not there or the
-- message is not one.
local function field(message, wanted)
  local at, found = 1, nil
  while at <= #message do
    local tag, value
    tag, at = number_at(message, at)
    if not tag then return nil end
    local kind = tag % 8
    if kind == 0 then
      value, at = number_at(message, at)
      if not value then return nil end
    elseif kind == 2 then
      local length
      length, at = number_at(message, at)
      if not length or at + length - 1 > #message then return nil end
      value, at = string.sub(message, at, at + length - 1), at + length
    elseif kind == 1 then
      at = at + 8
    elseif kind == 5 then
      at = at + 4
    else
      return nil
    end
    if value ~= nil and (tag - kind) / 8 == wanted then found = value end
  end
  return found
end

local function inside(message, ...)
  for _, number in ipairs({ ... }) do
    if type(message) ~= 'string' then return nil end
    message = field(message, number)
  end
  return message
end

-- The entries of a Struct: name -> Value, as bytes.
local function entries(struct)
  local found, at = {}, 1
  while at <= #struct do
    local tag, length
    tag, at = number_at(struct, at)
    if tag ~= 10 then return found end
    length, at = number_at(struct, at)
    if not length or at + length - 1 > #struct then return found end
    local entry = string.sub(struct, at, at + length - 1)
    local name = field(entry, 1)
    if type(name) == 'string' then found[name] = field(entry, 2) end
    at = at + length
  end
  return found
end

-- What the picker said: the servers that it names (text), or the status of its refusal (number); nil for neither.
function M.answer(body)
  local at = 1
  while at + 4 <= #body do
    local packed, a, b, c, d = string.byte(body, at, at + 4)
    local length = ((a * 256 + b) * 256 + c) * 256 + d
    if packed ~= 0 or at + 4 + length > #body then return nil end
    local message = string.sub(body, at + 5, at + 4 + length)
    local refusal = field(message, 7)
    if type(refusal) == 'string' then
      local status = inside(refusal, 1, 1)
      return type(status) == 'number' and status or 503
    end
    local metadata = field(message, 8)
    if type(metadata) == 'string' then
      local struct = inside(entries(metadata)[NS_PICKED], 5)
      local named = type(struct) == 'string' and inside(entries(struct)[PICKED], 3)
      -- Addresses and commas; metadata must not get what is no text.
      if type(named) == 'string' and string.find(named, '^[%w%.:,%[%] ]+$') then return named end
    end
    at = at + 5 + length
  end
  return nil
end

return M
