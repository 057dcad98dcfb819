-- SPDX-License-Identifier: Apache-2.0
-- Ask the engine for usage in a streamed request that did not, and hold it to the output that was
-- promised to a hard limit.
--
-- Does what a splice can do: puts one member in, or replaces one whose whole value is known.
-- Options that hold more than usage are merged by metering/ (ext_proc), with a JSON parser. Pure.

local json = require('envoy.lua.json')
local byte, find, sub = string.byte, string.find, string.sub

local M = {}

-- How a body is to be shaped: not at all, by putting a member in, by replacing one, by metering/.
M.NO, M.INSERT, M.REPLACE, M.SERVICE = 'no', 'insert', 'replace', 'service'

local FINAL = '{"include_usage":true}'
local RUNNING = '{"include_usage":true,"continuous_usage_stats":true}'
local KNOWN = { include_usage = true, continuous_usage_stats = true }

-- What a streamed request with these members needs.
function M.need(body, members)
  local span = members.stream_options
  if not span then return M.INSERT end
  if sub(body, span[1], span[2]) == 'null' then return M.REPLACE end
  -- The engine's own error about options that are no object is clearer than any of ours.
  if byte(body, span[1]) ~= 123 then return M.NO end
  local options = json.members(body, span[1])
  for name, inner in pairs(options or {}) do
    local text = sub(body, inner[1], inner[2])
    if not KNOWN[name] or (text ~= 'true' and text ~= 'false' and text ~= 'null') then return M.SERVICE end
  end
  return M.REPLACE
end

-- The body that asks for usage: in every chunk if the engine can, else in the last. nil: leave it as it is.
function M.ask_for_usage(body, how, can_run)
  local options = can_run and RUNNING or FINAL
  if how == M.INSERT then
    -- The gate has seen an object with at least one member, so a comma belongs here.
    local brace = find(body, '{', 1, true)
    return sub(body, 1, brace) .. '"stream_options":' .. options .. ',' .. sub(body, brace + 1)
  end
  if how == M.REPLACE then
    local members = json.members(body)
    local span = members and members.stream_options
    if not span then return nil end
    local asked = json.members(body, span[1])
    local running = asked and asked.continuous_usage_stats
    if running and sub(body, running[1], running[2]) == 'true' then options = RUNNING end
    return sub(body, 1, span[1] - 1) .. options .. sub(body, span[2] + 1)
  end
  return nil
end

-- The body that names the model as its server does; nil where it does so already, or names none.
function M.rename(body, name)
  local members = json.members(body)
  local span = members and members.model
  if not span then return nil end
  -- Names of models are printable ASCII.
  local quoted = '"' .. string.gsub(name, '["\\]', '\\%0') .. '"'
  if sub(body, span[1], span[2]) == quoted then return nil end
  return sub(body, 1, span[1] - 1) .. quoted .. sub(body, span[2] + 1)
end

-- Which member caps the output, per dialect; the first is the one to put in where there is none.
local CAPS = {
  ['openai.chat'] = { 'max_tokens', 'max_completion_tokens' },
  ['openai.completions'] = { 'max_tokens' },
  ['openai.responses'] = { 'max_output_tokens' },
  ['anthropic.messages'] = { 'max_tokens' },
}

-- The body that asks for at most `cap` output tokens a choice. nil: leave it as it is, it asks for no more.
-- The gate has seen each of these members, if it is there, to be null or a whole number.
function M.cap_output(body, dialect, cap)
  local names = CAPS[dialect]
  local members = names and json.members(body)
  if not members then return nil end
  local text, named = body, false
  -- From the back, so that positions in front stay right.
  local spans = {}
  for _, name in ipairs(names) do spans[#spans + 1] = members[name] end
  table.sort(spans, function(a, b) return a[1] > b[1] end)
  for _, span in ipairs(spans) do
    local number = tonumber(sub(body, span[1], span[2]))
    if number then
      named = true
      if number > cap then text = sub(text, 1, span[1] - 1) .. string.format('%d', cap) .. sub(text, span[2] + 1) end
    end
  end
  if named then return text ~= body and text or nil end
  -- Named as null: replaced, because a second member of the same name would be read by chance.
  local span = members[names[1]]
  if span then return sub(body, 1, span[1] - 1) .. string.format('%d', cap) .. sub(body, span[2] + 1) end
  local brace = find(body, '{', 1, true)
  return sub(body, 1, brace) .. '"' .. names[1] .. '":' .. string.format('%d', cap) .. ',' .. sub(body, brace + 1)
end

return M
