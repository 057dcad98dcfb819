-- SPDX-License-Identifier: Apache-2.0
-- The express lane: what this worker remembers of decisions, so that the next request need not ask.
--
-- An entry belongs to (credential, dialect, model): everything its decision depended on. It holds the
-- identity that extauth answered and, from ratelimit, a lease: how many requests and tokens may still
-- pass without asking. It ends when its time is over, when its lease is spent, or at once when word
-- comes that its key or tenant changed. Only admissions are remembered, never refusals.
-- Pure: the time and the news are arguments.

local find, gmatch, match = string.find, string.gmatch, string.match

local M = {}

-- Entries of one worker: two halves, the older of which is dropped when the newer one is full, so
-- that memory is bounded and what is used survives.
M.HALF_MAX = 10000
-- A longer credential is not remembered; extauth refuses it anyway.
M.CREDENTIAL_BYTES_MAX = 256

function M.new()
  return { newer = {}, older = {}, count = 0, sequence = 0, changed = {}, changed_count = 0 }
end

function M.key(credential, dialect, model)
  return dialect .. '\n' .. model .. '\n' .. credential
end

local function put(lane, key, entry)
  if lane.newer[key] == nil then
    lane.count = lane.count + 1
    if lane.count > M.HALF_MAX then
      lane.older, lane.newer, lane.count = lane.newer, {}, 1
    end
  end
  lane.newer[key] = entry
end

local function is_changed(lane, entry)
  local changed = lane.changed
  return (changed[entry.key_id] or 0) > entry.sequence or (changed[entry.tenant] or 0) > entry.sequence
end

-- Tokens that a request is charged before it is known what it uses: the sum of ratelimit/core/limits.py.
M.BYTES_PER_TOKEN, M.OUTPUT_ASSUMED, M.OUTPUT_HELD_MAX = 2.5, 512, 4096
function M.tokens(facts)
  local prompt = math.ceil(facts.prompt_bytes / M.BYTES_PER_TOKEN)
  if facts.dialect == 'openai.embeddings' then return prompt end
  local output = facts.output_tokens_max > 0 and facts.output_tokens_max or M.OUTPUT_ASSUMED
  return prompt + math.min(output, M.OUTPUT_HELD_MAX) * math.max(facts.choices, 1)
end

-- Remember an admission until `expires_ms`, as of the news that had been heard when it was asked for
-- (`sequence`). lease: { requests, tokens }, or nil where no limit applies.
function M.remember(lane, key, identity, lease, expires_ms, sequence)
  put(lane, key, {
    tenant = identity.tenant, project = identity.project, key_id = identity.key_id,
    sequence = sequence, expires_ms = expires_ms, lease = lease,
  })
end

-- The entry that lets a request of `tokens` pass now, its lease charged. Else nil (ask), and what is
-- left of the lease of an entry that ended, which whoever is asked gives back.
function M.take(lane, key, tokens, now_ms)
  local entry = lane.newer[key]
  if not entry then
    entry = lane.older[key]
    if not entry then return nil end
    put(lane, key, entry)
  end
  local lease = entry.lease
  if now_ms < entry.expires_ms and not is_changed(lane, entry) then
    if not lease then return entry end
    if lease.requests >= 1 and lease.tokens >= tokens then
      lease.requests, lease.tokens = lease.requests - 1, lease.tokens - tokens
      return entry
    end
  end
  lane.newer[key], lane.older[key] = nil, nil
  return nil, lease
end

-- Replace the tokens that `take` charged by those that were used. Beyond the lease it is a debt, which
-- goes to whoever is asked next.
function M.settle(entry, charged, used)
  local lease = entry.lease
  if lease then lease.tokens = lease.tokens + charged - used end
end

-- Hear the news: "SEQUENCE\n" and then a line "SEQUENCE ID" per changed key or tenant, oldest first.
-- A gap, or a sequence that went back, means that something went unheard: forget everything.
function M.hear(lane, news)
  local newest = tonumber(match(news, '^(%d+)\n'))
  if not newest or newest == lane.sequence then return end
  local oldest
  local changes = {}
  for sequence, id in gmatch(news, '\n(%d+) ([%w_-]+)') do
    sequence = tonumber(sequence)
    oldest = oldest or sequence
    if sequence > lane.sequence then changes[#changes + 1] = { sequence, id } end
  end
  local is_whole = newest > lane.sequence and oldest and oldest <= lane.sequence + 1
  if not is_whole or lane.changed_count + #changes > M.HALF_MAX then
    lane.newer, lane.older, lane.count = {}, {}, 0
    lane.changed, lane.changed_count = {}, 0
  else
    for _, change in ipairs(changes) do
      if not lane.changed[change[2]] then lane.changed_count = lane.changed_count + 1 end
      lane.changed[change[2]] = change[1]
    end
  end
  lane.sequence = newest
end

return M
