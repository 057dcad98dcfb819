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

-- Let the request pass if this worker remembers that it may; else note what is to be remembered.
function M.try(handle, facts, credential, request_id, now_ms, body, text)
  if not IS_ON or not credential or #credential > lane.CREDENTIAL_BYTES_MAX or facts.shape == 'service' then return end
  listen(now_ms)
  local key = lane.key(credential, facts.dialect, facts.model)
  local tokens = lane.tokens(facts)
  local entry, left = lane.take(cache, key, tokens, now_ms)
  local metadata = handle:streamInfo():dynamicMetadata()
  if not entry then
    metadata:set(REQUEST, 'asked', request_id)
    if left then
      metadata:set(REQUEST, 'lease_requests', tostring(left.requests))
      metadata:set(REQUEST, 'lease_tokens', tostring(left.tokens))
    end
    keep(request_id, { key = key, sequence = cache.sequence, asked_ms = now_ms })
    return
  end
  metadata:set(IDENTITY, 'tenant', entry.tenant)
  metadata:set(IDENTITY, 'project', entry.project)
  metadata:set(IDENTITY, 'key_id', entry.key_id)
  metadata:set(ADMISSION, 'admitted', true)
  metadata:set(USAGE, 'seen', 'none')
  if entry.lease then keep(request_id, { entry = entry, charged = tokens }) end
  if not record.start(handle, request_id, entry, facts, { admitted = true }) then return end
  if record.needs_shape(facts) then
    handle:clearRouteCache()
    record.shape(body, text, facts, handle:metadata():get('running_usage'))
  end
  -- Last: a script that fails before this leaves a request that is asked about as any other.
  metadata:set(REQUEST, 'express', request_id)
end

-- The answer has begun: remember what was answered for this request, if it may be.
function M.remember(request, metadata)
  local asked = request.asked and kept(request.asked)
  if not asked then return end
  local identity, admission = metadata:get(IDENTITY), metadata:get(ADMISSION)
  local for_ms = identity and identity.cache_ms
  if not for_ms or for_ms <= 0 or not admission or not admission.admitted then return end
  local lease = nil
  if not admission.unlimited then
    if not admission.lease_requests then return end
    lease = { requests = admission.lease_requests, tokens = admission.lease_tokens }
  end
  lane.remember(cache, asked.key, identity, lease, asked.asked_ms + for_ms, asked.sequence)
end

-- The answer is over: what it used replaces what it was charged.
function M.settle(request, used)
  local passed = request.express and kept(request.express)
  if passed then lane.settle(passed.entry, passed.charged, used) end
end

return M
