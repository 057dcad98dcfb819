-- SPDX-License-Identifier: Apache-2.0
-- Replace what a request reserved by what it used. Once, whoever says it first.
-- KEYS     the reservation, the index of open reservations. The counters' names are in the
--          reservation; they have the same hash tag, so they live in the same slot.
-- ARGV     input tokens (-1: nobody knows, the estimate stands), output tokens, cached tokens,
--          how long it is remembered that this request was settled (ms), the request
-- Answer: {1, tokens used beyond what was held for them, less than 0: held and not used}
--         | {0, 0} there was nothing (settled before, expired, or never reserved)
local stored = redis.call('GET', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[5])
if not stored or stored == '' then return { 0, 0 } end
redis.call('SET', KEYS[1], '', 'PX', ARGV[4])
local verdict, taken, text = string.match(stored, '^(%d)([01]*)(.*)$')
local demand = cjson.decode(text)
local now = clock()
local input, output, cached = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if input < 0 then input = demand['in'] end
cached = math.min(cached, input)

-- Rounded up to a whole nano-unit. Millions and the rest of each price apart: a product of tokens
-- and nano-units per million would not be exact in a double.
local function cost(price)
  local amount, rest = 0, 0
  local tokens = { input - cached, output, cached }
  for i = 1, 3 do
    local low = price[i] % 1000000
    amount = amount + tokens[i] * ((price[i] - low) / 1000000)
    rest = rest + tokens[i] * low
  end
  return amount + math.ceil(rest / 1000000)
end

local USED = {
  requests = function() return 1 end,
  tokens = function() return input + output end,
  input_tokens = function() return input end,
  output_tokens = function() return output end,
  cached_tokens = function() return cached end,
  money = function(counter) return type(counter.c) == 'table' and cost(counter.c) or 0 end,
}

for i, counter in ipairs(demand.c) do
  local hits = verdict == '1' and counter.f or counter.l
  if string.sub(taken, i, i) == '0' then
    -- A shadow limit without room: nothing was taken.
  elseif counter.k == 'leases' then
    redis.call('ZREM', counter.n, demand.r)
  elseif counter.k == 'slots' then
    leave_slot(counter, demand.t .. '/' .. demand.r)
  elseif counter.k == 'backlog' then
    add_backlog(counter, demand.t, USED[counter.u](counter) - hits, now)
  elseif counter.k == 'bucket' then
    if counter.u ~= 'requests' then
      put_debt(counter, debt_of(counter, now) + (USED[counter.u](counter) - hits) * counter.p, now)
    end
  -- A quota that was wiped meanwhile is given back by the ledger, which has this exchange in it.
  elseif redis.call('EXISTS', counter.n) == 1 then
    if redis.call('ZREM', counter.n .. ':held', whole(hits) .. ':' .. demand.r) == 1 then
      redis.call('HINCRBY', counter.n, 'held', whole(-hits))
    end
    redis.call('HINCRBY', counter.n, 'used', whole(USED[counter.u](counter)))
  end
end
return { 1, input + output - (verdict == '1' and demand.ft or demand.lt) }
