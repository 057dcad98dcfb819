-- SPDX-License-Identifier: Apache-2.0
-- The express lane: what this worker remembers of decisions, so that the next request need not ask.
--
-- An entry belongs to (credential, dialect, model): everything its decision depended on. It holds the
-- identity that extauth answered and, where limits apply, a lease from ratelimit: how many requests and
-- tokens may still pass without asking. Without a lease, or when it is spent, ratelimit is asked for each
-- request and extauth still is not. The entry ends when its time is over, or at once when word comes that
-- its key or tenant changed. Only admissions are remembered, never refusals.
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

-- Requests that a lease is asked for at the most, and how long somebody else's asking is waited for.
M.WANTED_MAX = 1000
M.ASKING_MS = 1000

-- Tokens that a request is charged before it is known what it uses: its prompt at the ratio of the request
-- that the lease came with, its output at what the caller named or ratelimit holds, whichever is less.
local function cost(lease, facts)
  local prompt = math.ceil(facts.prompt_bytes / lease.bytes_per_token)
  local output = lease.output
  if facts.output_tokens_max > 0 and facts.output_tokens_max < output then output = facts.output_tokens_max end
  return prompt + output * math.max(facts.choices, 1)
end

-- What ratelimit lends: requests, tokens (nil: no limit counts them), and what it reserved for the request
-- that asked, by which later ones are charged.
function M.lease(id, requests, tokens, input, output, prompt_bytes)
  return {
    id = id, requests = requests, tokens = tokens, output = output,
    bytes_per_token = prompt_bytes / math.max(input, 1),
  }
end

local function is_live(lane, entry, now_ms)
  return now_ms < entry.expires_ms and not is_changed(lane, entry)
end

local function lend(entry, lease)
  if lease.tokens then lease.tokens = lease.tokens - entry.owed end
  entry.lease, entry.owed = lease, 0
end

-- Remember an admission until `expires_ms`, as of the news that had been heard when it was asked for
-- (`sequence`). unlimited: no limit applies; else `lease`, or nil if none was given. Returns the entry that
-- holds the lease. What still lives is not replaced: its lease would be lost.
function M.remember(lane, key, identity, unlimited, lease, expires_ms, sequence, now_ms)
  local entry = lane.newer[key] or lane.older[key]
  if not entry or not is_live(lane, entry, now_ms) then
    entry = {
      tenant = identity.tenant, project = identity.project, key_id = identity.key_id,
      sequence = sequence, expires_ms = expires_ms, unlimited = unlimited, passed = 0, owed = 0,
    }
    put(lane, key, entry)
  end
  if not lease or entry.unlimited or entry.lease then return nil end
  lend(entry, lease)
  return entry
end

-- The answer to `id`, which asked for a lease and not who is calling. Returns the entry that holds it.
function M.lent(lane, key, id, lease)
  local entry = lane.newer[key] or lane.older[key]
  if not entry or entry.asking ~= id then return nil end
  entry.asking = nil
  if not lease then return nil end
  lend(entry, lease)
  return entry
end

local function ask(entry, id, now_ms, wanted)
  local lease = entry.lease
  entry.asking, entry.asked_ms, entry.lease, entry.passed = id, now_ms, nil, 0
  local said = tostring(math.min(wanted, M.WANTED_MAX))
  if not lease then return said end
  local tokens = lease.tokens and lease.tokens - entry.owed or 0
  entry.owed = 0
  return said .. ' ' .. lease.id .. ' ' .. lease.requests .. ' ' .. tokens
end

-- What this worker knows of a caller. Returns the entry if it lives; then either what its lease was charged
-- (0 if no limit applies), or nil and what to say to ratelimit about leases.
function M.take(lane, key, id, facts, now_ms)
  local entry = lane.newer[key]
  if not entry then
    entry = lane.older[key]
    if not entry then return nil, nil, '0' end
    put(lane, key, entry)
  end
  if not is_live(lane, entry, now_ms) then
    lane.newer[key], lane.older[key] = nil, nil
    -- Over in time: this worker's need is what it had.
    return nil, nil, entry.unlimited and '0' or ask(entry, id, now_ms, entry.passed)
  end
  if entry.unlimited then return entry, 0 end
  entry.passed = entry.passed + 1
  local lease = entry.lease
  if lease then
    local tokens = lease.tokens and cost(lease, facts) or 0
    if lease.requests >= 1 and (not lease.tokens or lease.tokens >= tokens) then
      lease.requests = lease.requests - 1
      if lease.tokens then lease.tokens = lease.tokens - tokens end
      return entry, tokens
    end
  end
  -- One asks; the others, until the answer is here, only for themselves.
  if entry.asking and now_ms - entry.asked_ms < M.ASKING_MS then return entry, nil, '0' end
  return entry, nil, ask(entry, id, now_ms, 2 * entry.passed)
end

-- Replace the tokens that `take` charged by those that were used. The lease may be another one by now.
function M.settle(lane, key, charged, used)
  local entry = lane.newer[key] or lane.older[key]
  if not entry or entry.unlimited then return end
  local lease = entry.lease
  if not lease then
    entry.owed = entry.owed + used - charged
  elseif lease.tokens then
    lease.tokens = lease.tokens + charged - used
  end
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
