-- SPDX-License-Identifier: Apache-2.0
-- Hold for a stream under way what it has delivered and the next slice of its output, or as much of
-- that as is left. Only hard counters go by it: all others were asked for the usual.
-- KEYS     the reservation. The counters' names are in it, as for settle.lua.
-- ARGV     input tokens (-1: nobody knows, the estimate stands), output tokens that are delivered if
--          this is granted, how many more to hold beyond them
-- Answer: output tokens held now. Fewer than were asked for: what is left does not pay them, and
--         nothing has changed. 0 there is no reservation (settled, expired, or never made).
local stored = redis.call('GET', KEYS[1])
if not stored or stored == '' then return '0' end
local reservation = reservation_of(stored)
local demand, taken = reservation.demand, reservation.taken
if reservation.verdict ~= 2 or not demand.o then return whole(demand.o and demand.o[3] or 0) end
local now = clock()
local input, output, more = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if input < 0 then input = reservation.input end
-- The model server is held to the full ask, so nothing beyond it can come.
local most = math.max(output, math.min(output + more, demand.o[3]))

-- What others use and hold of each hard counter, and what this request holds of it.
local others, own = {}, {}
for i, counter in ipairs(demand.c) do
  if is_hard(counter) and string.sub(taken, i, i) == '1' then
    local level = quota_of(counter, now)
    if not level then return whole(reservation.output) end
    own[i] = lean_hits(demand, counter, reservation.output, reservation.input)
    local holds = redis.call('ZSCORE', counter.n .. ':held', member(own[i], demand.r))
    others[i] = holds and level - own[i] or level
  end
end

local function fits(tokens)
  for i, level in pairs(others) do
    local counter = demand.c[i]
    if level + holds_of(counter, input, tokens, demand.q or 0) > counter.a then return false end
  end
  return true
end

local granted = most_that_fits(output, most, fits)
if not granted then return whole(reservation.output) end
for i in pairs(others) do
  local counter = demand.c[i]
  local hits, leases = holds_of(counter, input, granted, demand.q or 0), counter.n .. ':held'
  if redis.call('ZREM', leases, member(own[i], demand.r)) == 1 then
    redis.call('HINCRBY', counter.n, 'held', whole(-own[i]))
  end
  redis.call('HINCRBY', counter.n, 'held', whole(hits))
  redis.call('ZADD', leases, whole(now + demand.d), member(hits, demand.r))
  keep(counter, leases)
end
reservation.output, reservation.input = granted, input
put_reservation(KEYS[1], reservation)
return whole(granted)
