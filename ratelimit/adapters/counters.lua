-- SPDX-License-Identifier: Apache-2.0
-- Shared by admit.lua, renew.lua, settle.lua and repay.lua, which follow it: how counters and reservations are stored.
-- The arithmetic is that of ratelimit/core (bucket.py, decide.py); tests run the two side by side.
-- Redis 7.0 features only. The store's own time is the only clock, in microseconds.
--
--   bucket   hash {debt, at, leased, and "l:ID" -> hits of each lease} and, beside it, the sorted set
--            NAME:leases of lease ids by end
--   quota    hash {used, held, lent: the part of held that workers of Envoy have} and, beside it, the sorted set
--            NAME:held of "hits:request" by end
--   leases   sorted set of request by end
--   reservation   text: verdict, then per counter 1 if it was taken from, then of a lean one "=" the output
--                 and "," the input tokens that are held, then the demand as it came; of a lease of quotas the
--                 requests in place of the output, and of each counter what one of them takes
--
-- A counter in a demand: k kind, n name, u unit, e effect, a amount, p period in microseconds,
-- b burst, f and l the hits of the full and the lean ask, x when the store may forget it (ms since
-- 1970; 0: by its own state), c price {input, output, cached} in nano-units per million tokens, the
-- least that a request with any token costs, what each of its meter costs, the input tokens that it may turn out
-- to have, tiers from the lowest: {input, output, cached, above so many input tokens, reasoning}, and what reasoning costs.

local DAYS_400_MS = 34560000000
-- Leases purged in one call; more wait for the next, and until then count as held.
local PURGED_MAX = 100
-- No lease is longer: a bucket with one is kept until it has ended and drained.
local LEASED_MS_MAX = 60000

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Lua's own number format keeps 14 digits. Plus zero: "-0" is no integer to the store.
local function whole(n) return string.format('%.0f', n + 0) end
local function exact(n) return string.format('%.17g', n) end

local function drained(counter, debt, from, till)
  return math.max(0, debt - math.max(0, till - from) * counter.a)
end

-- Debt that was leased, by counter: what `debt_of` found and `put_debt` must not store twice.
local leased = {}

-- Leased hits do not drain. A lease that was not given back counts, from its end on, as spent at that moment:
-- later than any of its requests, so never too little.
local function end_leases(counter, debt, at, held, now, till)
  local over = redis.call('ZRANGEBYSCORE', counter.n .. ':leases', '-inf', till, 'WITHSCORES', 'LIMIT', 0, PURGED_MAX)
  for i = 1, #over, 2 do
    local ends = math.min(tonumber(over[i + 1]), now)
    local hits = tonumber(redis.call('HGET', counter.n, 'l:' .. over[i]) or '0')
    debt, at, held = drained(counter, debt, at, ends) + hits * counter.p, math.max(at, ends), held - hits
    redis.call('HDEL', counter.n, 'l:' .. over[i])
    redis.call('ZREM', counter.n .. ':leases', over[i])
  end
  if #over > 0 then
    redis.call('HSET', counter.n, 'debt', exact(debt), 'at', whole(at), 'leased', whole(math.max(0, held)))
  end
  return debt, at, math.max(0, held)
end

local function debt_of(counter, now)
  local stored = redis.call('HMGET', counter.n, 'debt', 'at', 'leased')
  local debt, at, held = tonumber(stored[1] or '0'), tonumber(stored[2] or '0'), tonumber(stored[3] or '0')
  local till = whole(now)
  if at > now then
    -- The clock went back: the debt counts from what it shows now, or nothing would drain until it has caught up.
    redis.call('HSET', counter.n, 'at', whole(now))
    at, till = now, '+inf'
  end
  if held > 0 then debt, at, held = end_leases(counter, debt, at, held, now, till) end
  leased[counter.n] = held * counter.p
  return drained(counter, debt, at, now) + leased[counter.n]
end

-- debt: as `debt_of` gives it, with what is leased.
local function put_debt(counter, debt, now)
  local held = leased[counter.n]
  local own = math.max(0, debt - held)
  if own <= 0 and held <= 0 then
    redis.call('DEL', counter.n)
    return
  end
  redis.call('HSET', counter.n, 'debt', exact(own), 'at', whole(now))
  local life = math.min(math.ceil((own + held) / math.max(counter.a, 1) / 1000) + 1000, DAYS_400_MS)
  if held > 0 then
    life = life + LEASED_MS_MAX
    redis.call('PEXPIRE', counter.n .. ':leases', whole(life))
  end
  redis.call('PEXPIRE', counter.n, whole(life))
end

local function keep(counter, key)
  if counter.x > 0 then
    redis.call('PEXPIREAT', key, whole(counter.x))
  else
    redis.call('PEXPIRE', key, whole(DAYS_400_MS))
  end
end

-- A lease of quotas among the holders of one.
local LENT = '+lent'
local function lent_name(id) return id .. LENT end

-- Used and held of a quota together, held alone, and what of that is lent; nil if the store knows nothing of it.
local function quota_of(counter, now)
  local stored = redis.call('HMGET', counter.n, 'used', 'held', 'lent')
  if not stored[1] then return nil end
  local held, lent = tonumber(stored[2] or '0'), tonumber(stored[3] or '0')
  local leases = counter.n .. ':held'
  local over = redis.call('ZRANGEBYSCORE', leases, '-inf', whole(now), 'LIMIT', 0, PURGED_MAX)
  for _, member in ipairs(over) do
    local hits = tonumber(string.match(member, '^%d+'))
    held = held - hits
    if string.sub(member, -#LENT) == LENT then lent = lent - hits end
    redis.call('ZREM', leases, member)
  end
  if #over > 0 then redis.call('HSET', counter.n, 'held', whole(held), 'lent', whole(lent)) end
  return tonumber(stored[1]) + held, held, lent
end

local function leases_of(counter, now)
  local over = redis.call('ZRANGEBYSCORE', counter.n, '-inf', whole(now), 'LIMIT', 0, PURGED_MAX)
  if #over > 0 then redis.call('ZREM', counter.n, unpack(over)) end
  return redis.call('ZCOUNT', counter.n, '(' .. whole(now), '+inf')
end

-- Nano-units of parts {tokens, their price, ...}, rounded up to a whole one. Millions and the rest of each price
-- apart: a product of tokens and nano-units per million would not be exact in a double.
local function rounded(price, parts, quantity)
  local amount, rest = 0, 0
  for i = 1, #parts, 2 do
    local low = parts[i + 1] % 1000000
    amount = amount + parts[i] * ((parts[i + 1] - low) / 1000000)
    rest = rest + parts[i] * low
  end
  return math.max(price[4] or 0, amount + math.ceil(rest / 1000000) + quantity * (price[5] or 0))
end

-- Of reasoning, which is output; null: as any other.
local function reasoning_price(prices, price)
  local said = prices[5]
  if prices == price then said = price[8] end
  return type(said) == 'number' and said or prices[2]
end

-- By the tier that so many input tokens fall into.
local function cost(price, input, output, cached, quantity, reasoning)
  if input == 0 and output == 0 and quantity == 0 then return 0 end
  local prices = price
  for _, tier in ipairs(price[7] or {}) do
    if input > tier[4] then prices = tier end
  end
  return rounded(price, {
    input - cached, prices[1], cached, prices[3],
    output - reasoning, prices[2], reasoning, reasoning_price(prices, price),
  }, quantity)
end

-- The most, whatever is cached or reasoning, by the dearest tier that the request may fall into.
local function worst_cost(price, input, output, quantity)
  if input == 0 and output == 0 and quantity == 0 then return 0 end
  local function at(prices)
    return rounded(price, {
      input, math.max(prices[1], prices[3]), output, math.max(prices[2], reasoning_price(prices, price)),
    }, quantity)
  end
  local most = at(price)
  for _, tier in ipairs(price[7] or {}) do
    if tier[4] < math.max(input, price[6]) then most = math.max(most, at(tier)) end
  end
  return most
end

local HITS = {
  tokens = function(_, input, output) return input + output end,
  input_tokens = function(_, input) return input end,
  output_tokens = function(_, _, output) return output end,
  cached_tokens = function(_, _, _, cached) return cached end,
  money = function(counter, input, output, cached, quantity, reasoning)
    return type(counter.c) == 'table' and cost(counter.c, input, output, cached, quantity, reasoning) or 0
  end,
}

-- What so many tokens, and so much of what else is metered, add to a counter; a request is one hit of requests and of concurrency.
local function hits_of(counter, input, output, cached, quantity, reasoning)
  local counted = HITS[counter.u]
  return counted and counted(counter, input, output, cached, quantity, reasoning) or 1
end

-- A quota or budget that may not be overshot: what is asked of it goes by the output that is granted.
local function is_hard(counter) return counter.k == 'quota' and counter.e == 'refuse' end

-- Hits that are held of a hard counter for so many tokens.
local function holds_of(counter, input, output, quantity)
  if counter.u == 'money' and type(counter.c) == 'table' then return worst_cost(counter.c, input, output, quantity) end
  return hits_of(counter, input, output, 0, quantity, 0)
end

-- Hits that the lean ask takes of a counter where so many tokens are held. Any but a hard counter is asked
-- for the usual, and settles as a debt.
local function lean_hits(demand, counter, output, input)
  if not demand.o or not is_hard(counter) then return counter.l end
  return holds_of(counter, input, output, demand.q or 0)
end

-- The most tokens that fit, from `high` down to `low`; nil if not even those do.
local function most_that_fits(low, high, fits)
  if fits(high) then return high end
  if low >= high or not fits(low) then return nil end
  while high - low > 1 do
    local middle = math.floor((low + high) / 2)
    if fits(middle) then low = middle else high = middle end
  end
  return low
end

-- Who holds how much of a quota, in the sorted set of its holders.
local function member(hits, request) return whole(hits) .. ':' .. request end

local function reservation_of(stored)
  local verdict, taken, output, input, text = string.match(stored, '^(%d)([01]*)=?(%d*),?(%d*)(.*)$')
  local demand = cjson.decode(text)
  return {
    verdict = tonumber(verdict), taken = taken, text = text, demand = demand,
    output = tonumber(output) or demand.o and demand.o[2], input = tonumber(input) or demand['in'],
  }
end

local function put_reservation(key, it)
  local held = it.verdict == 2 and '=' .. whole(it.output) .. ',' .. whole(it.input) or ''
  -- The demand as it came: encoding it again would round its numbers to 14 digits.
  redis.call('SET', key, it.verdict .. it.taken .. held .. it.text, 'PX', whole(it.demand.d / 1000))
end
