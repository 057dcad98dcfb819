-- SPDX-License-Identifier: Apache-2.0
-- Replace what a lease holds of quotas by what the ledger says it was spent on. Once.
-- KEYS     the lease's reservation, the index of those. The counters' names are in the reservation, as for settle.lua.
-- ARGV     the lease, JSON: counter name -> hits that were used, as text
-- Answer: 1, or 0 if it was repaid before or its time was over
local stored = redis.call('GET', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if not stored then return 0 end
redis.call('DEL', KEYS[1])
local reservation, used = reservation_of(stored), cjson.decode(ARGV[2])
for _, counter in ipairs(reservation.demand.c) do
  -- A quota that was wiped meanwhile is given back by the ledger, which has what was spent in it.
  if redis.call('EXISTS', counter.n) == 1 then
    local hits = reservation.output * counter.f
    if redis.call('ZREM', counter.n .. ':held', member(hits, lent_name(ARGV[1]))) == 1 then
      redis.call('HINCRBY', counter.n, 'held', whole(-hits))
      redis.call('HINCRBY', counter.n, 'lent', whole(-hits))
      redis.call('HINCRBY', counter.n, 'used', used[counter.n])
    end
  end
end
return 1
