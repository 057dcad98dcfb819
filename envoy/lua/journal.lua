-- SPDX-License-Identifier: Apache-2.0
-- Write a request's start record to the journal, before the request goes to a model server.
--
-- Envoy's own log leaves its buffer every 50 ms; what is in the buffer dies with a killed Envoy.
-- This record is one write(2) to the page cache, so from the moment a model server can have seen
-- a request, the journal knows whose it is. The file is the workers' own: appends of one write each do
-- not interleave, and Envoy flushes its log in slices, in whose middle a record of ours could land.

local quoted = require('envoy.lua.json').quoted

local M = {}

local PATH = 'journal/starts.jsonl'
-- While this file exists nothing is admitted: the collector makes it when the disk is nearly full,
-- so that there is room for the end records of what is under way.
local CLOSED_PATH = 'journal/closed'
-- The file is opened anew this often, so that a rotated journal is let go.
local REOPEN_SECONDS = 2

local file, opened_at

local function closed()
  local mark = io.open(CLOSED_PATH, 'r')
  if mark then mark:close() end
  return mark ~= nil
end

local function opened(now)
  if file and now - opened_at < REOPEN_SECONDS and now >= opened_at then return file end
  if file then file:close() end
  file, opened_at = not closed() and io.open(PATH, 'a') or nil, now
  -- Buffered whole and flushed after each line: one system call a record.
  if file then file:setvbuf('full', 16384) end
  return file
end

local function object(fields, names)
  local text, comma = '{"', ''
  for i = 1, #names do
    local name = names[i]
    local value = fields[name]
    if value ~= nil then
      local kind = type(value)
      value = (kind == 'boolean' or kind == 'number') and tostring(value) or quoted(value)
      text, comma = text .. comma .. name .. '":' .. value, ',"'
    end
  end
  return comma == '' and '{}' or text .. '}'
end

local IDENTITY = { 'tenant', 'project', 'key_id' }
local REQUEST = { 'started_at', 'dialect', 'model', 'stream', 'prompt_bytes', 'output_tokens_max', 'choices', 'quantity' }
local ADMISSION = { 'admitted', 'reserved_tokens', 'lease' }

-- Append the start record; false if it could not be written.
function M.start(request_id, identity, request, admission, epoch)
  local out = opened(os.time())
  if not out then return false end
  local written = out:write(
    '{"type":"Start","request_id":', quoted(request_id), ',"started_at":', quoted(request.started_at),
    ',"epoch":', quoted(epoch), ',"identity":', object(identity, IDENTITY), ',"request":', object(request, REQUEST),
    ',"admission":', object(admission, ADMISSION), '}\n')
  if written and out:flush() then return true end
  file:close()
  file = nil
  return false
end

-- Compiled, a flush that fails is tried again by the interpreter, when nothing is left to be written, and that succeeds.
jit.off(M.start)

return M
