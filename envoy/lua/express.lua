-- SPDX-License-Identifier: Apache-2.0
-- Drive the express lane: hear the news, let a request pass on what is remembered, remember what was
-- answered. The moving part; the rules are lane.lua's.

local lane = require('envoy.lua.lane')
local record = require('envoy.lua.record')

local M = {}

local REQUEST = 'peaje.request'
local IDENTITY = 'envoy.filters.http.ext_authz'
local ADMISSION = 'envoy.filters.http.ratelimit'
local USAGE = 'peaje.usage'

-- Written by the beacon (chassis/beacon.py), replaced whole at each change of a key, tenant or limit.
local NEWS_PATH = 'run/changes'
-- Looked at this often: the part of the revocation bound that is this file's.
local NEWS_EVERY_MS = 100
-- "off": ask for every request.
local IS_ON = os.getenv('PEAJE_EXPRESS') ~= 'off'
-- Requests under way that something is to be done for when they end. Bounded: those of callers who
-- left before any answer are pushed out.
local UNDER_WAY_HALF_MAX = 5000

local cache = lane.new()
local newer, older, count = {}, {}, 0
local heard_at = 0

local function listen(now_ms)
  if now_ms - heard_at < NEWS_EVERY_MS and now_ms >= heard_at then return end
  heard_at = now_ms
  local file = io.open(NEWS_PATH, 'r')
  if not file then return end
  lane.hear(cache, file:read('*a') or '')
  file:close()
end

local function keep(request_id, what)
  count = count + 1
  if count > UNDER_WAY_HALF_MAX then older, newer, count = newer, {}, 1 end
  newer[request_id] = what
end

local function kept(request_id)
  local what = newer[request_id] or older[request_id]
  newer[request_id], older[request_id] = nil, nil
  return what
end

local function recognise(metadata, entry, request_id)
  metadata:set(IDENTITY, 'tenant', entry.tenant)
  metadata:set(IDENTITY, 'project', entry.project)
  metadata:set(IDENTITY, 'key_id', entry.key_id)
  metadata:set(REQUEST, 'recognised', request_id)
end

-- Do what this worker can do by what it remembers: let the request pass, or spare it extauth, or note what
-- is to be remembered of the answer.
function M.try(handle, facts, credential, request_id, now_ms, body, text)
  if not IS_ON or not credential or #credential > lane.CREDENTIAL_BYTES_MAX or facts.shape == 'service' then return end
  listen(now_ms)
  local key = lane.key(credential, facts.dialect, facts.model)
  local entry, charged, wish = lane.take(cache, key, request_id, facts, now_ms)
  local metadata = handle:streamInfo():dynamicMetadata()
  if not charged then
    -- Quotas too: this Envoy says which request passed on which lease.
    if wish ~= '0' then metadata:set(REQUEST, 'lease', wish .. ' quotas') end
    if entry then recognise(metadata, entry, request_id) end
    if not entry or wish ~= '0' then
      metadata:set(REQUEST, 'asked', request_id)
      keep(request_id, {
        key = key, prompt_bytes = facts.prompt_bytes, now_ms = now_ms, sequence = cache.sequence, known = entry ~= nil,
      })
    end
    return
  end
  recognise(metadata, entry, request_id)
  metadata:set(ADMISSION, 'admitted', true)
  metadata:set(USAGE, 'seen', 'none')
  local lease = entry.lease
  if lease then keep(request_id, { key = key, charged = charged, entry = entry }) end
  -- What was spent of a quota's lease is found in the ledger by this.
  local lent = lease and lease.bounds and lease.id
  if lent then metadata:set(ADMISSION, 'lease', lent) end
  if not record.start(handle, request_id, entry, facts, { admitted = true, lease = lent or nil }) then return end
  local cap = lent and lane.cap(lease.bounds, facts)
  if record.needs_shape(facts, cap) then
    record.shape(body, text, facts, handle:metadata():get('running_usage'), cap)
  end
  -- Last: a script that fails before this leaves a request that ratelimit is asked about.
  metadata:set(REQUEST, 'express', request_id)
end

local LIMIT_HEADERS = {
  'x-ratelimit-limit-requests', 'x-ratelimit-reset-requests', 'x-ratelimit-limit-tokens', 'x-ratelimit-reset-tokens',
}

-- What the answer that brought the lease says of limits; it counts the lease as held.
local function told_by(headers)
  -- Of a header that is not there `get` gives nothing at all, which is no argument.
  local told = { requests = tonumber((headers:get('x-ratelimit-remaining-requests'))),
                 tokens = tonumber((headers:get('x-ratelimit-remaining-tokens'))) }
  for _, name in ipairs(LIMIT_HEADERS) do told[name] = headers:get(name) end
  return told
end

local function bounds_of(admission)
  local prompt_bytes = admission.lease_prompt_bytes
  return prompt_bytes and { prompt_bytes = prompt_bytes, output = admission.lease_output_max, cap = admission.lease_cap }
end

-- The answer has begun: remember what was answered for this request, if it may be.
function M.remember(handle, request, metadata)
  local asked = request.asked and kept(request.asked)
  if not asked then return end
  local identity, admission = metadata:get(IDENTITY), metadata:get(ADMISSION) or {}
  local lease = admission.lease_requests and lane.lease(
    request.asked, admission.lease_requests, admission.lease_tokens, admission.lease_input, admission.lease_output,
    asked.prompt_bytes, asked.now_ms, bounds_of(admission))
  local entry
  if asked.known then
    entry = lane.lent(cache, asked.key, request.asked, lease)
  else
    local for_ms = identity and identity.cache_ms
    if not for_ms or for_ms <= 0 or not admission.admitted then return end
    entry = lane.remember(cache, asked.key, identity, admission.unlimited, lease, asked.now_ms + for_ms, asked.sequence,
      asked.now_ms, request.asked)
  end
  if entry then entry.told = told_by(handle:headers()) end
end

-- What ratelimit would say of limits to a request that passed on a lease: what is left of it is the caller's.
function M.tell(handle, request)
  local passed = newer[request.express] or older[request.express]
  local told, lease = passed and passed.entry.told, passed and passed.entry.lease
  if not told or not lease then return end
  local headers, ahead = handle:headers(), passed.entry.ahead or { requests = 0, tokens = 0 }
  for _, name in ipairs(LIMIT_HEADERS) do
    if told[name] then headers:add(name, told[name]) end
  end
  if told.requests then headers:add('x-ratelimit-remaining-requests', tostring(told.requests + lease.requests + ahead.requests)) end
  if told.tokens then
    -- A limit on tokens may be younger than either lease, which then holds none of it.
    local lent = (lease.tokens or 0) + (ahead.tokens or 0)
    headers:add('x-ratelimit-remaining-tokens', tostring(math.max(0, told.tokens + lent)))
  end
end

-- The answer is over: what it used replaces what it was charged.
function M.settle(request, used)
  local passed = request.express and kept(request.express)
  if passed then lane.settle(cache, passed.key, passed.charged, used) end
end

return M
