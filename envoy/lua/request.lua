-- SPDX-License-Identifier: Apache-2.0
-- Read from a request body what decisions depend on, and refuse what can be read two ways.
--
-- Pure: text in, facts or a refusal out. gate.lua writes the facts to metadata.

local json = require('envoy.lua.json')
local shape = require('envoy.lua.shape')
local byte, sub, find = string.byte, string.sub, string.find

local M = {}

-- Longest model name; it becomes a metric label, a descriptor value and a column.
M.MODEL_BYTES_MAX = 200
-- A request for more tokens than any model's context is a mistake or an attack.
M.OUTPUT_TOKENS_MAX = 10000000
M.CHOICES_MAX = 128
-- Array elements (prompts, inputs, documents) in one request.
M.PROMPTS_MAX = 2048
-- A reranker reads its query once with each document; more than this is more than any limit is counted in.
M.REPEATED_BYTES_MAX = 900000000
-- Documents of one search, as Cohere counts them.
M.DOCUMENTS_PER_SEARCH = 100

-- Which member caps the output, per dialect; the first name is the one preferred in messages.
local OUTPUT_LIMITS = {
  ['openai.chat'] = { 'max_completion_tokens', 'max_tokens' },
  ['openai.completions'] = { 'max_tokens' },
  ['openai.responses'] = { 'max_output_tokens' },
  ['anthropic.messages'] = { 'max_tokens' },
  ['openai.embeddings'] = {},
  ['rerank'] = {},
  ['openai.images'] = {},
  ['openai.speech'] = {},
}

-- What an engine reads first, per dialect; the first that is there counts.
local PROMPTS = {
  ['openai.chat'] = { 'messages' },
  ['openai.completions'] = { 'prompt' },
  ['openai.responses'] = { 'instructions', 'input' },
  ['anthropic.messages'] = { 'system', 'messages' },
  ['openai.embeddings'] = {},
  ['rerank'] = { 'query' },
  ['openai.images'] = { 'prompt' },
  ['openai.speech'] = { 'input' },
}

local STREAMS_WITHOUT_USAGE = { ['openai.chat'] = true, ['openai.completions'] = true }

-- What a model server remembers of an earlier answer. It does not know whose that was: another tenant's would be read, and
-- its tokens are in no estimate of the prompt.
local KEPT_BY_SERVERS = { ['openai.responses'] = { 'previous_response_id', 'conversation' } }

local function refusal(message, param)
  return nil, { status = 400, code = 'invalid_request', message = message, param = param }
end

local function value(body, members, name)
  local span = members[name]
  if not span then return nil end
  local text = sub(body, span[1], span[2])
  if text == 'null' then return nil end
  return text
end

local function whole_number(text, most)
  if not find(text, '^%d+$') or #text > 9 then return nil end
  local number = tonumber(text)
  if number < 1 or number > most then return nil end
  return number
end

local function boolean(body, members, name)
  local text = value(body, members, name)
  if text == nil or text == 'false' then return false end
  if text == 'true' then return true end
  return nil
end

local function output_limit(body, members, dialect)
  local limit
  for _, name in ipairs(OUTPUT_LIMITS[dialect]) do
    local text = value(body, members, name)
    if text then
      local number = whole_number(text, M.OUTPUT_TOKENS_MAX)
      if not number then return nil, name .. ' must be a whole number from 1 to ' .. M.OUTPUT_TOKENS_MAX .. '.', name end
      if limit and limit ~= number then return nil, 'max_tokens and max_completion_tokens disagree.', name end
      limit = number
    end
  end
  return limit or 0
end

local CHOICES = { 'n', 'best_of' }

-- How many completions the caller asks for: n (or best_of) for each prompt.
local function choices(body, members, dialect)
  local count = 1
  for _, name in ipairs(CHOICES) do
    local text = value(body, members, name)
    if text then
      local number = whole_number(text, M.CHOICES_MAX)
      if not number then return nil, name .. ' must be a whole number from 1 to ' .. M.CHOICES_MAX .. '.', name end
      if number > count then count = number end
    end
  end
  local span = dialect == 'openai.completions' and members.prompt
  if span and sub(body, span[1], span[1]) == '[' then
    local prompts = json.array(body, span[1], span[2], M.PROMPTS_MAX)
    if not prompts then return nil, 'prompt is not a well-formed array.', 'prompt' end
    if prompts > M.PROMPTS_MAX then return nil, 'Too many prompts in one request.', 'prompt' end
    if prompts > 0 then count = count * prompts end
  end
  return count
end

local function asked_for_usage(body, members)
  local span = members.stream_options
  if not span or sub(body, span[1], span[1]) ~= '{' then return 'no' end
  local options = json.members(body, span[1])
  if not options then return nil end
  -- An engine sends no running usage either to who asked for none.
  if value(body, options, 'include_usage') == 'false' then return 'no' end
  if boolean(body, options, 'continuous_usage_stats') then return 'running' end
  if boolean(body, options, 'include_usage') then return 'final' end
  return 'no'
end

-- Of a request that is metered by more than tokens, or by something else: how much of it is asked for, as
-- { quantity, repeated_bytes }; or nil, what is wrong with it, and where.
local METERS = {}

-- Searches, of which each has so many documents. The query is read as often as there are documents.
METERS['rerank'] = function(body, members)
  local query = value(body, members, 'query')
  if not query or byte(query, 1) ~= 34 then return nil, 'query is required and must be a string.', 'query' end
  local span = members.documents
  local count = span and json.array(body, span[1], span[2], M.PROMPTS_MAX)
  if not count or count < 1 then return nil, 'documents is required and must be an array.', 'documents' end
  if count > M.PROMPTS_MAX then return nil, 'Too many documents in one request.', 'documents' end
  return {
    quantity = math.ceil(count / M.DOCUMENTS_PER_SEARCH),
    repeated_bytes = math.min((count - 1) * (#query - 2), M.REPEATED_BYTES_MAX),
  }
end

METERS['openai.images'] = function(_, _, count) return { quantity = count } end

-- Characters (code points) of the text to be spoken.
METERS['openai.speech'] = function(body, members)
  local quoted = value(body, members, 'input')
  local text = quoted and json.text(quoted)
  if not text or text == '' then return nil, 'input is required and must be a string.', 'input' end
  local _, first_bytes = string.gsub(text, '[^\128-\191]', '')
  -- Escaped, a character beyond U+FFFF is two halves; the second half is none.
  local _, second_halves = string.gsub(text, '\237[\176-\191]', '')
  return { quantity = first_bytes - second_halves }
end

-- Where the prompt begins; the body's own beginning where none is named.
local function prompt_at(members, dialect)
  for _, name in ipairs(PROMPTS[dialect]) do
    if members[name] then return members[name][1] end
  end
  return 1
end

-- Facts of a request: { model, stream, output_tokens_max (0: not said), choices, wants_usage, shape, prompt_at,
-- quantity and repeated_bytes where there is a meter }, or nil and a refusal { status, code, message, param }.
function M.read(body, dialect)
  local members, reason = json.document(body)
  if not members then return refusal('The body is not a usable JSON object: ' .. reason .. '.') end

  local quoted = value(body, members, 'model')
  local model = quoted and json.text(quoted)
  if not model or model == '' then return refusal('model is required and must be a string.', 'model') end
  if #model > M.MODEL_BYTES_MAX or find(model, '[^\33-\126]') then
    return nil, { status = 404, code = 'model_not_found', message = 'No such model.', param = 'model' }
  end

  local stream = boolean(body, members, 'stream')
  if stream == nil then return refusal('stream must be true or false.', 'stream') end
  if boolean(body, members, 'background') ~= false then
    return refusal('background responses are not served: their usage could not be metered.', 'background')
  end
  for _, name in ipairs(KEPT_BY_SERVERS[dialect] or {}) do
    if value(body, members, name) then
      return refusal(name .. ' is not served: a model server gives what it keeps to whoever names it. Send all of the input.', name)
    end
  end

  local limit, message, param = output_limit(body, members, dialect)
  if not limit then return refusal(message, param) end
  local count
  count, message, param = choices(body, members, dialect)
  if not count then return refusal(message, param) end
  local meter = METERS[dialect]
  local metered = {}
  if meter then
    if stream then return refusal('A streamed answer of this kind is not served: it could not be metered.', 'stream') end
    metered, message, param = meter(body, members, count)
    if not metered then return refusal(message, param) end
  end

  local wants_usage = asked_for_usage(body, members)
  if not wants_usage then return refusal('stream_options is not a usable JSON object.', 'stream_options') end
  return {
    model = model,
    stream = stream,
    output_tokens_max = limit,
    choices = count,
    wants_usage = wants_usage,
    prompt_at = prompt_at(members, dialect),
    shape = (stream and STREAMS_WITHOUT_USAGE[dialect]) and shape.need(body, members) or shape.NO,
    quantity = metered.quantity,
    repeated_bytes = metered.repeated_bytes,
  }
end

return M
