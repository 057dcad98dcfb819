-- SPDX-License-Identifier: Apache-2.0
-- Find the members of a JSON object without building it; write a string.
--
-- Knows where each top-level member begins and ends; nested values are skipped,
-- strings by jumping from quote to quote, so that a 100 KB prompt costs about what
-- memchr costs. It does not validate what it skips: the model server does. It does
-- refuse what two parsers could read differently: duplicate keys, text after the
-- object, no object at all. Pure: no Envoy API, so it also runs under tests.

local byte, find, sub, char = string.byte, string.find, string.sub, string.char

local M = {}

-- Deeper than any request of the supported dialects; bounds work, not memory.
M.DEPTH_MAX = 200
-- Members of one object and bytes of one key: a million of either would hold Envoy's thread for seconds.
M.MEMBERS_MAX = 500
M.KEY_BYTES_MAX = 1000

local UNSAFE = '[%c"\\\127-\255]'

-- What `text` is as a JSON string, in ASCII; each byte that is not is one character.
function M.quoted(text)
  text = tostring(text)
  -- Most are ids and numbers.
  if not find(text, UNSAFE) then return '"' .. text .. '"' end
  return '"' .. string.gsub(text, UNSAFE, function(c) return string.format('\\u%04x', byte(c)) end) .. '"'
end

local QUOTE, BACKSLASH, OPEN_BRACKET, OPEN_BRACE, CLOSE_BRACE = 34, 92, 91, 123, 125
local COLON, COMMA = 58, 44
local SPACE, TAB, NEWLINE, RETURN = 32, 9, 10, 13

local ESCAPES = {
  ['"'] = '"', ['\\'] = '\\', ['/'] = '/',
  b = '\b', f = '\f', n = '\n', r = '\r', t = '\t',
}

local function utf8_of(code)
  if code < 0x80 then return char(code) end
  if code < 0x800 then return char(0xC0 + math.floor(code / 64), 0x80 + code % 64) end
  return char(0xE0 + math.floor(code / 4096), 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
end

-- Position and byte of the first thing at or after i that is not space; nil at the end. A pattern for every gap would
-- cost more than all else here: most are of no space, or of one.
local function skip(s, i)
  local c = byte(s, i)
  if c == SPACE then
    i = i + 1
    c = byte(s, i)
  end
  if c == SPACE or c == TAB or c == RETURN or c == NEWLINE then
    i = find(s, '[^ \t\r\n]', i + 1)
    c = i and byte(s, i)
  end
  return c and i, c
end

-- Index of the quote that closes the string opening at i, or nil.
local function string_end(s, i)
  local j = i
  while true do
    j = find(s, '"', j + 1, true)
    if not j then return nil end
    local k = j - 1
    while byte(s, k) == BACKSLASH do k = k - 1 end
    if (j - k) % 2 == 1 then return j end
  end
end

local function nested_end(s, i)
  local depth, j = 0, i
  while true do
    j = find(s, '["%[%]{}]', j)
    if not j then return nil end
    local c = byte(s, j)
    if c == QUOTE then
      j = string_end(s, j)
      if not j then return nil end
    elseif c == OPEN_BRACKET or c == OPEN_BRACE then
      depth = depth + 1
      if depth > M.DEPTH_MAX then return nil end
    else
      depth = depth - 1
      if depth == 0 then return j end
    end
    j = j + 1
  end
end

local function value_end(s, i, c)
  if c == QUOTE then return string_end(s, i) end
  if c == OPEN_BRACE or c == OPEN_BRACKET then return nested_end(s, i) end
  local j = find(s, '[%s,}%]]', i)
  if not j or j == i then return nil end
  return j - 1
end

-- The text of the JSON string whose quotes are at first and last, or nil when an escape is invalid.
local function text_at(s, first, last)
  local inner = sub(s, first + 1, last - 1)
  if not find(inner, '\\', 1, true) then return inner end
  local valid = true
  inner = string.gsub(inner, '\\(.)(%x?%x?%x?%x?)', function(kind, hex)
    if kind == 'u' then
      if #hex ~= 4 then valid = false return '' end
      return utf8_of(tonumber(hex, 16))
    end
    local plain = ESCAPES[kind]
    if not plain then valid = false return '' end
    return plain .. hex
  end)
  return valid and inner or nil
end

-- The text of a JSON string given with its quotes, or nil when it is none or an escape is invalid.
function M.text(quoted)
  if byte(quoted, 1) ~= QUOTE then return nil end
  return text_at(quoted, 1, #quoted)
end

-- Members of the object that opens at `from` (default: the first byte that is not space).
-- Returns { key = { first, last, key_first } } with byte positions of each value and the
-- position of its key's quote, and the position of the closing brace; or nil and a reason.
function M.members(s, from)
  local i, c = skip(s, from or 1)
  if c ~= OPEN_BRACE then return nil, 'not an object' end
  local members, count = {}, 0
  i, c = skip(s, i + 1)
  if c == CLOSE_BRACE then return members, i end
  while i do
    if c ~= QUOTE then return nil, 'a key must be a string' end
    local key_last = string_end(s, i)
    if not key_last then return nil, 'an unfinished string' end
    count = count + 1
    if count > M.MEMBERS_MAX or key_last - i - 1 > M.KEY_BYTES_MAX then return nil, 'too many or too long keys' end
    local key = text_at(s, i, key_last)
    if not key then return nil, 'an invalid escape in a key' end
    if members[key] then return nil, 'a duplicate key' end
    local colon, first, last
    colon, c = skip(s, key_last + 1)
    if c ~= COLON then return nil, 'a key without a value' end
    first, c = skip(s, colon + 1)
    last = first and value_end(s, first, c)
    if not last then return nil, 'an unfinished or too deeply nested value' end
    members[key] = { first, last, i }
    i, c = skip(s, last + 1)
    if c == CLOSE_BRACE then return members, i end
    if c ~= COMMA then return nil, 'a missing comma' end
    i, c = skip(s, i + 1)
  end
  return nil, 'an unfinished object'
end

-- As members(), for a text that must be one object and nothing else.
function M.document(s)
  local members, last = M.members(s)
  if not members then return nil, last end
  if skip(s, last + 1) then return nil, 'text after the object' end
  return members
end

-- Number of elements of the array at s[first..last] and the kind of its first element ("string",
-- "array", "object", "number"); nil when it is not a well-formed array. Stops counting beyond `most`, and
-- at a first number: token ids are one prompt, however many they are.
function M.array(s, first, last, most)
  if byte(s, first) ~= OPEN_BRACKET then return nil end
  local i, c = skip(s, first + 1)
  if i == last then return 0, nil end
  local kind = c == QUOTE and 'string' or c == OPEN_BRACKET and 'array' or c == OPEN_BRACE and 'object' or 'number'
  if kind == 'number' then return 1, kind end
  local count = 0
  while i and i < last do
    local element_last = value_end(s, i, c)
    if not element_last then return nil end
    count = count + 1
    i, c = skip(s, element_last + 1)
    if i == last or count > most then return count, kind end
    if c ~= COMMA then return nil end
    i, c = skip(s, i + 1)
  end
  return nil
end

return M
