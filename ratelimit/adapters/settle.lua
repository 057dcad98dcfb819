-- SPDX-License-Identifier: Apache-2.0
-- Replace what a request reserved by what it used. Once, whoever says it first.
-- KEYS     the reservation, the index of open reservations. The counters' names are in the
--          reservation; they have the same hash tag, so they live in the same slot.
-- ARGV     input tokens (-1: nobody knows, the estimate stands), output tokens, cached tokens,
--          how long it is remembered that this request was settled (ms), the request, how much was delivered
--          of what else it is metered by, output tokens that were reasoning, 0 if there was no exchange at all
-- Answer: {1, tokens used beyond what was held for them, less than 0: held and not used}
--         | {0, 0} there was nothing (settled before, expired, or never reserved)
local stored = redis.call('GET', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[5])
if not stored or stored == '' then return { 0, 0 } end
redis.call('SET', KEYS[1], '', 'PX', ARGV[4])
local reservation = reservation_of(stored)
local demand, taken = reservation.demand, reservation.taken
local now = clock()
local input, output, cached = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local quantity = tonumber(ARGV[6]) or 0
local reasoning = math.min(tonumber(ARGV[7]) or 0, output)
if input < 0 then input = demand['in'] end
cached = math.min(cached, input)

for i, counter in ipairs(demand.c) do
  local hits = counter.f
  if reservation.verdict == 2 then hits = lean_hits(demand, counter, reservation.output, reservation.input) end
  if string.sub(taken, i, i) == '0' then
    -- A shadow limit without room: nothing was taken.
  elseif counter.k == 'leases' then
    redis.call('ZREM', counter.n, demand.r)
  elseif counter.k == 'slots' then
    leave_slot(counter, demand.t .. '/' .. demand.r)
  elseif counter.k == 'backlog' then
    add_backlog(counter, demand.t, hits_of(counter, input, output, cached, quantity, reasoning) - hits, now)
  elseif counter.k == 'bucket' then
    if counter.u ~= 'requests' then
      put_debt(counter, debt_of(counter, now) + (hits_of(counter, input, output, cached, quantity, reasoning) - hits) * counter.p, now)
    end
  -- A quota that was wiped meanwhile is given back by the ledger, which has this exchange in it.
  elseif redis.call('EXISTS', counter.n) == 1 then
    if redis.call('ZREM', counter.n .. ':held', member(hits, demand.r)) == 1 then
      redis.call('HINCRBY', counter.n, 'held', whole(-hits))
    end
    if ARGV[8] ~= '0' then
      redis.call('HINCRBY', counter.n, 'used', whole(hits_of(counter, input, output, cached, quantity, reasoning)))
    end
  end
end
local held = reservation.input + (reservation.output or 0)
if reservation.verdict == 1 then held = demand.ft or held end
return { 1, input + output - held }
