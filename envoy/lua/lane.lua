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

-- Requests are counted for so long at least before the count begins anew: of two questions in a row the second would
-- otherwise know of nobody, and ask for next to nothing.
M.COUNTED_MS = 1000
-- Requests that a lease is asked for at the most, and how long somebody else's asking is waited for.
M.WANTED_MAX = 1000
M.ASKING_MS = 1000
-- Questions whose answers are not here yet, of one caller: those of more than a lease's time. Beyond it, none is known.
M.SENT_MAX = 8
-- From when a lease was asked for, so long it is spent; ratelimit counts it as spent two seconds later.
M.LEASE_MS = 5000
-- The next one is asked for while this many times as many can still pass as came while the last one was awaited.
M.AHEAD = 1.5
-- An answer may take far longer than the last one: of a lease that is spent before its time is over, so much is kept for that.
M.KEPT = 1 / 4

-- Tokens that a request is charged before it is known what it uses: its prompt at the ratio of the request
-- that the lease came with, its output at what the caller named or ratelimit holds, whichever is less.
local function cost(lease, facts)
  local prompt = math.ceil(facts.prompt_bytes / lease.bytes_per_token)
  local output = lease.output
  if facts.output_tokens_max > 0 and facts.output_tokens_max < output then output = facts.output_tokens_max end
  return prompt + output * math.max(facts.choices, 1)
end

-- What ratelimit lends: requests, tokens (nil: no limit counts them), what it reserved for the request that
-- asked, by which later ones are charged, and when it was asked. bounds: of quotas, what a request on it may be at the
-- most { prompt_bytes, output of all choices, cap of each choice }; output and cap nil: no quota goes by them.
function M.lease(id, requests, tokens, input, output, prompt_bytes, asked_ms, bounds)
  return {
    id = id, requests = requests, kept = requests * M.KEPT, tokens = tokens, output = output, bounds = bounds,
    bytes_per_token = prompt_bytes / math.max(input, 1), asked_ms = asked_ms, until_ms = asked_ms + M.LEASE_MS,
  }
end

-- Output tokens of a choice that the model server has to be held to, if a request passes on a lease with these bounds;
-- nil: it names no more itself.
function M.cap(bounds, facts)
  local cap, named = bounds.cap, facts.output_tokens_max
  return cap and (named == 0 or named > cap) and cap or nil
end

-- Whether a request is no larger than what each one on the lease is held at.
local function is_within(bounds, facts)
  if facts.prompt_bytes > bounds.prompt_bytes then return false end
  local each = M.cap(bounds, facts) or facts.output_tokens_max
  return not bounds.cap or each * math.max(facts.choices, 1) <= bounds.output
end

local function is_live(lane, entry, now_ms)
  return now_ms < entry.expires_ms and not is_changed(lane, entry)
end

-- What a lease charges for a request; nil: it does not let it pass.
local function charge(lease, facts, now_ms)
  -- A clock that went back makes a lease twice as long at the most: what is not told of a quota in time is counted as not
  -- spent. A request that takes long to come was there before its lease.
  if lease.requests < 1 or now_ms >= lease.until_ms or now_ms < lease.asked_ms - M.LEASE_MS then return nil end
  if lease.bounds and not is_within(lease.bounds, facts) then return nil end
  local tokens = lease.tokens and cost(lease, facts) or 0
  if lease.tokens and lease.tokens < tokens then return nil end
  return tokens
end

-- A debt of the lease before is paid by this one; its rest is given back with the next question.
local function turn(entry, lease)
  local before = entry.lease
  if before then
    if before.tokens and before.tokens < 0 then
      entry.owed = entry.owed - before.tokens
      before.tokens = 0
    end
    entry.back = before
  end
  if lease.tokens then lease.tokens = lease.tokens - entry.owed end
  entry.lease, entry.owed = lease, 0
end

-- A lease that was asked for ahead waits until the one before it is spent.
local function lend(entry, lease)
  if not entry.lease then
    turn(entry, lease)
  elseif not entry.ahead then
    entry.ahead = lease
  else
    entry.back = lease
  end
  return entry
end

-- The answer to a question is here: as many came while it was awaited. Nil if there was no such question.
local function answered(entry, id)
  if entry.asking == id then entry.asking = nil end
  local came = entry.sent[id]
  if not came then return nil end
  entry.sent[id], entry.sent_count = nil, entry.sent_count - 1
  entry.waited = entry.came - came
  return entry
end

-- Remember an admission until `expires_ms`, as of the news that had been heard when it was asked for
-- (`sequence`). unlimited: no limit applies; else `lease`, or nil if none was given. `id`: of the request that
-- asked. Returns the entry that holds the lease. What still lives is as the decision says that lasts longest, and
-- keeps its lease.
function M.remember(lane, key, identity, unlimited, lease, expires_ms, sequence, now_ms, id)
  local entry = lane.newer[key] or lane.older[key]
  if entry then answered(entry, id) end
  if not entry or not is_live(lane, entry, now_ms) then
    entry = {
      expires_ms = 0, passed = 0, since_ms = now_ms, recent = entry and entry.recent or 0, owed = 0, came = 0,
      waited = entry and entry.waited or 0, sent = {}, sent_count = 0,
    }
    put(lane, key, entry)
  end
  if expires_ms > entry.expires_ms then
    entry.tenant, entry.project, entry.key_id = identity.tenant, identity.project, identity.key_id
    entry.unlimited, entry.expires_ms, entry.sequence = unlimited, expires_ms, sequence
  end
  return lease and not entry.unlimited and lend(entry, lease) or nil
end

-- The answer to `id`, which asked for a lease and not who is calling; late, it brings one all the same. Returns the
-- entry that holds it.
function M.lent(lane, key, id, lease)
  local entry = lane.newer[key] or lane.older[key]
  return entry and answered(entry, id) and lease and lend(entry, lease) or nil
end

-- Send a request to ask: what it says, with what is given back.
local function ask(entry, id, now_ms, wanted, back)
  if entry.sent_count >= M.SENT_MAX then entry.sent, entry.sent_count = {}, 0 end
  entry.sent[id], entry.sent_count = entry.came, entry.sent_count + 1
  entry.asking, entry.asked_ms = id, now_ms
  local counted_ms = now_ms - entry.since_ms
  if counted_ms >= M.COUNTED_MS then
    entry.recent = entry.passed * M.COUNTED_MS / counted_ms
    entry.passed, entry.since_ms = 0, now_ms
  end
  local said = tostring(math.min(wanted, M.WANTED_MAX))
  if not back then return said end
  local tokens = back.tokens and back.tokens - entry.owed or 0
  entry.owed = 0
  return said .. ' ' .. back.id .. ' ' .. back.requests .. ' ' .. tokens
end

-- The rest of a lease that another one has taken the place of.
local function take_back(entry)
  local back = entry.back
  entry.back = nil
  return back
end

-- The lease that lets nothing pass any more, or that of who is not known any more.
local function surrender(entry)
  local back = entry.lease or entry.back
  entry.lease, entry.back = nil, nil
  return back
end

-- Whether fewer than so many more come until then, at the rate at which they came since the count began.
local function ends_soon(entry, until_ms, now_ms, coming)
  return (until_ms - now_ms) * entry.passed < coming * (now_ms - entry.since_ms)
end

-- Whether who is calling is to be asked before it is forgotten. A question for a lease would be in the way of it, so
-- it is time as soon as two answers cannot be awaited one after the other.
local function is_ending(entry, now_ms)
  return entry.waited > 0 and ends_soon(entry, entry.expires_ms, now_ms, 2 * M.AHEAD * entry.waited)
end

-- How many come in a lease's time at the rate since the count began, or that of before it, and two standard deviations
-- more where they come at random: the next lease ends by its time then. No less than while an answer is awaited.
local function need(entry, now_ms)
  local counted_ms = math.max(now_ms - entry.since_ms, M.COUNTED_MS)
  local coming = math.max(entry.passed / counted_ms, entry.recent / M.COUNTED_MS) * M.LEASE_MS
  return math.ceil(math.max(coming + 2 * math.sqrt(coming), 2 * entry.waited))
end

-- Of a lease that is spent before its time is over all the same, the next one lasts twice as long.
local function need_more(entry, now_ms)
  return math.max(2 * entry.passed, need(entry, now_ms))
end

-- How many requests the next lease is asked for, if it is time to: more than is needed if this one is spent soon, as
-- many if its time is over soon; else nil.
local function wanted_ahead(entry, lease, tokens, now_ms)
  local coming = M.AHEAD * entry.waited
  if coming == 0 or entry.ahead then return nil end
  local is_low = lease.requests < lease.kept and not ends_soon(entry, lease.until_ms, now_ms, lease.requests)
  if is_low or lease.requests < coming or (lease.tokens and lease.tokens < coming * tokens) then
    return need_more(entry, now_ms)
  end
  return ends_soon(entry, lease.until_ms, now_ms, coming) and need(entry, now_ms) or nil
end

-- What this worker knows of a caller. Returns the entry if it lives; then what its lease was charged (0 if no
-- limit applies) or nil; then what to say to ratelimit about leases, if the request is to ask. No entry: extauth
-- is asked as well.
function M.take(lane, key, id, facts, now_ms)
  local entry = lane.newer[key]
  if not entry then
    entry = lane.older[key]
    if not entry then return nil, nil, '0' end
    put(lane, key, entry)
  end
  entry.came = entry.came + 1
  local is_asking = entry.asking and now_ms - entry.asked_ms < M.ASKING_MS
  if not is_live(lane, entry, now_ms) then
    if is_changed(lane, entry) then lane.newer[key], lane.older[key] = nil, nil end
    -- It stays to count who comes until it is known again; nothing makes it live.
    local is_first = entry.expires_ms > 0
    entry.expires_ms = 0
    if not is_first or entry.unlimited then
      if is_first and not is_asking then ask(entry, id, now_ms, 0) end
      return nil, nil, '0'
    end
    -- Over in time: this worker's need is what it had.
    return nil, nil, ask(entry, id, now_ms, need(entry, now_ms), surrender(entry))
  end
  entry.passed = entry.passed + 1
  -- Busy enough that others come while it is asked who is calling: one goes ahead.
  if not is_asking and is_ending(entry, now_ms) then
    return nil, nil, ask(entry, id, now_ms, entry.unlimited and 0 or need(entry, now_ms), take_back(entry))
  end
  if entry.unlimited then return entry, 0 end
  local lease = entry.lease
  local tokens = lease and charge(lease, facts, now_ms)
  if not tokens and entry.ahead then
    lease, entry.ahead = entry.ahead, nil
    turn(entry, lease)
    tokens = charge(lease, facts, now_ms)
  end
  if tokens then
    local wanted = not is_asking and wanted_ahead(entry, lease, tokens, now_ms)
    if wanted then return entry, nil, ask(entry, id, now_ms, wanted, take_back(entry)) end
    lease.requests = lease.requests - 1
    if lease.tokens then lease.tokens = lease.tokens - tokens end
    return entry, tokens
  end
  -- One asks; the others, until the answer is here, only for themselves.
  if is_asking then return entry, nil, '0' end
  return entry, nil, ask(entry, id, now_ms, need_more(entry, now_ms), surrender(entry))
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
