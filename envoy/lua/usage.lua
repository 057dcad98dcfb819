-- SPDX-License-Identifier: Apache-2.0
-- Read token usage from an answer as it passes, and hide the usage the caller did not ask for.
--
-- Only the structure of the engine's JSON counts: text inside strings, however much it
-- looks like usage, is skipped as a string. Pure: bytes in, bytes out; tap.lua moves them.

local json = require('envoy.lua.json')
local byte, find, match, sub = string.byte, string.find, string.match, string.sub

local M = {}

-- An SSE event that is longer passes through unread and is marked; engines send a few KB.
M.EVENT_BYTES_MAX = 1048576
-- The usage object of any engine is a few hundred bytes.
M.USAGE_BYTES_MAX = 16384

-- Beyond this a double is no longer a whole number, and no answer has as many tokens.
local COUNT_MAX = 9007199254740992

-- A count that is negative, no number or impossible reads as -1, which the collector clamps and flags.
local function number(text, members, name)
  local span = members and members[name]
  if not span then return nil end
  local raw = sub(text, span[1], span[2])
  if raw == 'null' then return nil end
  local n = tonumber(raw)
  -- tonumber() reads "nan" and hexadecimal too, JSON does not.
  if not n or find(raw, '[^%d%.eE%+%-]') or n > COUNT_MAX or n < 0 then return -1 end
  return n
end

local function nested(text, members, name)
  local span = members[name]
  if not span or byte(text, span[1]) ~= 123 then return nil end
  return (json.members(text, span[1]))
end

-- Merge the usage object at text[first..] into counts; says whether it had any count. of_total: an engine that
-- generates nothing may say the sum only.
-- OpenAI counts cached tokens inside the prompt; Anthropic counts them beside the input.
local function merge(counts, text, first, of_total)
  local members = json.members(text, first)
  if not members then return false end
  local input = number(text, members, 'prompt_tokens') or number(text, members, 'input_tokens')
  local output = number(text, members, 'completion_tokens') or number(text, members, 'output_tokens')
  if of_total and not input and not output then input = number(text, members, 'total_tokens') end
  local details = nested(text, members, 'prompt_tokens_details') or nested(text, members, 'input_tokens_details')
  local output_details = nested(text, members, 'completion_tokens_details')
    or nested(text, members, 'output_tokens_details')
  local cached = number(text, details, 'cached_tokens')
  local cache_read = number(text, members, 'cache_read_input_tokens')
  local cache_write = number(text, members, 'cache_creation_input_tokens')
  if input and (cache_read or cache_write) then
    input = input + (cache_read or 0) + (cache_write or 0)
    cached = cache_read
  end
  local decreased = (output and output < (counts.output or 0)) or (input and input < (counts.input or 0))
  counts.input = input or counts.input
  counts.output = output or counts.output
  counts.cached = cached or counts.cached
  counts.reasoning = number(text, output_details, 'reasoning_tokens') or counts.reasoning
  return (input or output) ~= nil, decreased
end

-- The members that may hold usage one level down: Responses events and Anthropic's message_start.
local CARRIERS = { 'response', 'message' }

local function usage_span(data, members)
  local span = members.usage
  if span and byte(data, span[1]) == 123 then return span end
  for _, carrier in ipairs(CARRIERS) do
    local inner = nested(data, members, carrier)
    if inner and inner.usage and byte(data, inner.usage[1]) == 123 then return inner.usage end
  end
  return nil
end

-- data without its usage member (wants "no"), or with it as null as OpenAI does (wants "final").
local function without_usage(data, span, wants)
  if wants == 'final' then return sub(data, 1, span[1] - 1) .. 'null' .. sub(data, span[2] + 1) end
  local before, after = sub(data, 1, span[3] - 1), sub(data, span[2] + 1)
  local trimmed, commas = string.gsub(before, ',%s*$', '', 1)
  if commas == 0 then after = string.gsub(after, '^%s*,', '', 1) end
  return trimmed .. after
end

local FINAL_TYPES = {
  ['"response.completed"'] = true, ['"response.incomplete"'] = true, ['"response.failed"'] = true,
  ['"message_delta"'] = true, ['"speech.audio.done"'] = true,
}

-- Where a usage object begins, if the member belongs to the outermost object for certain.
-- Quotes inside JSON strings are escaped, so `,"usage":{` is a member's beginning wherever it stands;
-- if nothing after its object opens or closes but the last brace of all, that brace is its owner's.
local function plain_usage(data)
  local at = find(data, ',"usage":{', 1, true)
  if at and find(data, '^%b{}[^{}%[%]\\]*}%s*$', at + 9) then return at end
  return nil
end

-- The whole number after `name` (with its quotes and colon), which stands at or after `at`; nil if none does.
local function plain_count(data, name, at)
  local _, last = find(data, name, at, true)
  return last and tonumber(match(data, '^(%d+)[,}]', last + 1))
end

-- Counts of the usual usage object, read without a parser; nil where anything about it is unusual.
local function plain_counts(data, at)
  if find(data, '"reasoning_tokens"', at, true) then return nil end
  local input, output = plain_count(data, '"prompt_tokens":', at), plain_count(data, '"completion_tokens":', at)
  if not input or not output or input > COUNT_MAX or output > COUNT_MAX then return nil end
  return input, output, plain_count(data, '"cached_tokens":', at)
end

-- The usual running frame of an engine: true if it was one, and its new text.
local function read_running(self, data)
  -- The last member of all: what plain_usage asks for, and that nothing but the last brace follows.
  local at = find(data, ',"usage":{', 1, true)
  if not at or not find(data, '^%b{}}$', at + 9) then return false end
  local input, output, cached = plain_counts(data, at)
  local counts = self.counts
  if not input or output < (counts.output or 0) or input < (counts.input or 0) then return false end
  -- No choice, or the last frame of one. By how the members end: bytes that are rarer than quotes are found sooner, and a
  -- frame that is taken for one of these by mistake is only read by the parser.
  if find(data, ':[]', 1, true) or find(data, 'finish_reason":"', 1, true) then return false end
  counts.input, counts.output, counts.cached = input, output, cached or counts.cached
  if self.seen == 'none' then self.seen = 'running' end
  self.readings, self.frames = self.readings + 1, self.frames + 1
  return true, sub(data, 1, at - 1) .. (self.wants == 'final' and ',"usage":null}' or '}')
end

-- Members whose text was generated, in a chunk and in a typed delta. Quotes inside JSON strings are
-- escaped, so these can only match members, and one that holds at least a character.
local CHUNK_TEXT = {
  '"content":%s*"[^"]', '"text":%s*"[^"]', '"reasoning_content":%s*"[^"]', '"reasoning":%s*"[^"]', '"arguments":%s*"[^"]',
}
local DELTA_TEXT = { '"delta":%s*"[^"]', '"text":%s*"[^"]', '"thinking":%s*"[^"]', '"partial_json":%s*"[^"]' }

-- Whether a frame carried generated text: not a role, an end, a ping, or a summary of frames before it.
local function carries(data)
  local members = find(data, '"choices"', 1, true) and CHUNK_TEXT or find(data, '[._]delta"') and DELTA_TEXT
  for _, member in ipairs(members or {}) do
    if find(data, member) then return true end
  end
  return false
end

-- Read one event's data. Returns: nil to leave it as it is, false to drop it, or its new text.
local function read_event(self, data)
  if self.hides then
    local was_running, instead = read_running(self, data)
    if was_running then return instead end
  end
  if not find(data, '"usage"', 1, true) then
    -- Nothing that follows the terminator is read, so it passes, whether it comes with it or later.
    if data == '[DONE]' then self.passing = true elseif carries(data) then self.frames = self.frames + 1 end
    return nil
  end
  local members = json.document(data)
  if not members then
    self.anomaly = 'invalid'
    return nil
  end
  local span = usage_span(data, members)
  if not span then
    if carries(data) then self.frames = self.frames + 1 end
    return nil
  end
  local choices = members.choices
  local usage_only = choices and find(sub(data, choices[1], choices[2]), '^%[%s*%]$') ~= nil
  if not usage_only and carries(data) then self.frames = self.frames + 1 end
  local counted, decreased = merge(self.counts, data, span[1])
  if counted then
    -- Anthropic's message_start holds an estimate that message_delta corrects: no anomaly there.
    if decreased and self.seen ~= 'none' and not members.type then self.anomaly = 'decreased' end
    local kind = members.type and FINAL_TYPES[sub(data, members.type[1], members.type[2])]
    -- Quotes inside JSON strings are escaped, so this can only match the engine's own member.
    local finished = find(data, '"finish_reason":%s*"') ~= nil
    self.seen = (usage_only or kind or finished or self.seen == 'final') and 'final' or 'running'
    self.readings = self.readings + 1
  end

  if not self.hides then return nil end
  if usage_only then
    if self.wants == 'no' then return false end
    return nil
  end
  return without_usage(data, span, self.wants)
end

-- Without the space at its end. Not by the pattern '%s+$': that costs the square of the longest
-- run of spaces, and a caller can have a model say a million.
local function trimmed(text)
  local last = #text
  while last > 0 and byte(text, last) <= 32 do last = last - 1 end
  return sub(text, 1, last)
end

-- The data of one event: its data lines joined by newlines, or nil when it has none.
local function data_of(event)
  -- The usual event is one line: no pattern, which would step through all of it.
  if sub(event, 1, 6) == 'data: ' and find(event, '\n', 1, true) == #event - 1 and not find(event, '\r', 1, true) then
    return trimmed(sub(event, 7, -3)), true
  end
  local single = match(event, '^data: ?([^\r\n]*)[\r\n]*$')
  if single then return trimmed(single), true end
  local lines = {}
  for line in string.gmatch(event, '[^\r\n]+') do
    local data = match(line, '^data: ?(.*)$')
    if data then lines[#lines + 1] = data end
  end
  if #lines == 0 then return nil end
  return trimmed(table.concat(lines, '\n'))
end

-- Position of the last byte of the blank line that ends the first event at or after `from`.
local function event_end(text, from, has_return)
  local _, last = find(text, '\n\n', from, true)
  if not has_return then return last end
  for _, pattern in ipairs({ '\r\n\r\n', '\r\r', '\n\r\n' }) do
    local _, other = find(text, pattern, from, true)
    if other and (not last or other < last) then last = other end
  end
  return last
end

local function replaced(event, data)
  local lines = {}
  for line in string.gmatch(event, '[^\r\n]+') do
    if not find(line, '^data:') then lines[#lines + 1] = line end
  end
  lines[#lines + 1] = 'data: ' .. string.gsub(data, '\n', '\ndata: ')
  return table.concat(lines, '\n') .. '\n\n'
end

-- Feed a piece of an SSE body; returns what to send on instead, or nil to send it as it is.
local function feed_events(self, piece)
  if self.passing then return nil end
  local changed = self.held ~= ''
  local text = changed and self.held .. piece or piece
  local has_return = find(text, '\r', 1, true) ~= nil
  local out, from = {}, 1
  while not self.passing do
    local last = event_end(text, from, has_return)
    if not last then break end
    local event = sub(text, from, last)
    local data, is_single = data_of(event)
    local verdict = nil
    if data then verdict = read_event(self, data) end
    if verdict == nil then
      out[#out + 1] = event
    else
      changed = true
      if verdict then out[#out + 1] = is_single and 'data: ' .. verdict .. '\n\n' or replaced(event, verdict) end
    end
    from = last + 1
  end
  -- An unfinished event waits for its end, because it may be one that must be hidden; the
  -- terminator never is, so that a stream which omits the last blank line still ends.
  local rest = sub(text, from)
  if not self.passing then
    if #rest > M.EVENT_BYTES_MAX then
      self.anomaly, self.passing = 'event_too_large', true
    elseif find(rest, '^data: ?%[DONE%]') then
      self.passing = true
    end
  end
  if self.passing then out[#out + 1], rest = rest, '' end
  self.held = rest
  -- Where nothing is ever hidden, nothing waits either.
  if not self.hides or (not changed and rest == '') then return nil end
  return table.concat(out)
end

-- Searches that Cohere's `meta` says were billed.
local function billed_searches(text)
  local members = json.members(text)
  local billed = members and nested(text, members, 'billed_units')
  return billed and number(text, billed, 'search_units')
end

-- A captured object is complete: what it says.
local function read_captured(self)
  if self.captured == 'meta' then
    local searches = billed_searches(self.capture)
    if searches then self.quantity, self.readings = searches, self.readings + 1 end
  elseif merge(self.counts, self.capture, 1, self.meter == 'searches') then
    self.seen, self.readings = 'final', self.readings + 1
  end
  self.capture = nil
end

-- An object or array opens at piece[at]: what of it is to be kept or counted.
local function opens(self, piece, at, c)
  if self.depth == 1 then
    local key = self.key
    local is_read = key == 'usage' or (key == 'meta' and self.meter == 'searches')
    if c == 123 and is_read and not self.capture then self.capture, self.captured = sub(piece, at), key end
    self.in_data = c == 91 and key == 'data'
  elseif self.depth == 2 and self.in_data and c == 123 and self.meter == 'images' then
    -- Counted as its first byte passes: by then it was made, and who leaves within it has had it.
    self.quantity, self.readings = self.quantity + 1, self.readings + 1
  end
  self.depth, self.key = self.depth + 1, nil
end

-- Feed a piece of a JSON body: follow depth and strings, keep only the top-level usage object and what is metered.
local function feed_object(self, piece)
  local i, n = 1, #piece
  -- Most answers come whole, and then need no following.
  if not self.meter and self.depth == 0 and not self.in_string and self.readings == 0 and byte(piece, 1) == 123 then
    local at = find(piece, '^%b{}%s*$') and plain_usage(piece)
    local input, output, cached = nil, nil, nil
    if at then input, output, cached = plain_counts(piece, at) end
    if input then
      self.counts.input, self.counts.output, self.counts.cached = input, output, cached
      self.seen, self.readings = 'final', 1
      return nil
    end
  end
  if self.capture then
    self.capture = self.capture .. piece
    if #self.capture > M.USAGE_BYTES_MAX + n then self.anomaly, self.capture = 'invalid', nil end
  end
  while i <= n do
    if self.in_string then
      if self.escaped then
        self.escaped = false
        i = i + 1
      else
        local j = find(piece, '["\\]', i)
        if self.key and #self.key < 16 then self.key = self.key .. sub(piece, i, (j or n + 1) - 1) end
        if not j then return nil end
        if byte(piece, j) == 92 then
          self.escaped = true
          if self.key then self.key = self.key .. '\\' end
        else
          self.in_string = false
        end
        i = j + 1
      end
    else
      local j = find(piece, '["%[%]{}]', i)
      if not j then return nil end
      local c = byte(piece, j)
      if c == 34 then
        self.in_string, self.key = true, self.depth == 1 and '' or nil
      elseif c == 123 or c == 91 then
        opens(self, piece, j, c)
      else
        self.depth, self.key = self.depth - 1, nil
        if self.depth == 1 and self.capture then read_captured(self) end
      end
      i = j + 1
    end
  end
  return nil
end

-- A reader of one answer. kind: "events" (SSE) or "object" (JSON). wants: what the caller asked
-- for ("no", "final", "running"); hiding applies only to dialects that have that question. meter: what an answer
-- in JSON is also counted by ("images", "searches"), if anything.
function M.reader(kind, wants, meter)
  return {
    -- readings: how often counts were read, so that whoever publishes them knows of each.
    counts = {}, seen = 'none', frames = 0, readings = 0, anomaly = nil,
    wants = wants or 'running', hides = wants == 'no' or wants == 'final',
    held = '', passing = false,
    -- No image is none; a search that nobody billed is not known.
    meter = meter, quantity = meter == 'images' and 0 or nil, in_data = false, captured = nil,
    depth = 0, in_string = false, escaped = false, key = nil, capture = nil,
    feed = kind == 'events' and feed_events or feed_object,
  }
end

-- Tokens to settle: what was read so far.
function M.total(reader)
  local total = (reader.counts.input or 0) + (reader.counts.output or 0)
  return total > 0 and total or 0
end

return M
