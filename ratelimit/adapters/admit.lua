-- SPDX-License-Identifier: Apache-2.0
-- Take all that one request asks, or nothing, and note what was taken.
-- KEYS     every key that may be touched, all with the tenant's hash tag: the reservation, the index
--          of open reservations, the counters
-- ARGV[1]  the demand as JSON: t tenant, r request, s whether it settles, d lease in microseconds, in estimated
--          input tokens, c counters
-- ARGV[2]  JSON: counter name -> used, from the ledger, for quotas that the store knows nothing of
-- Answer: {verdict, now, then per counter its level, 1 if it had room, else 0, and for a fair share the wait}
--         verdict 0 refused, 1 full, 2 lean, -1 a quota is not known and no seed was given
local demand, seeds = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local now = clock()
local levels, rooms, waits = {}, {}, {}

for i, counter in ipairs(demand.c) do
  if counter.k == 'bucket' then
    levels[i] = debt_of(counter, now)
  elseif counter.k == 'leases' then
    levels[i] = leases_of(counter, now)
  elseif counter.k == 'slots' then
    levels[i], waits[i] = slots_of(counter, demand.t, now)
  elseif counter.k == 'backlog' then
    levels[i], waits[i] = backlog_of(counter, demand.t, now)
  else
    levels[i] = quota_of(counter, now)
    if not levels[i] then
      local seed = seeds[counter.n]
      if not seed then return { -1, whole(now) } end
      redis.call('HSETNX', counter.n, 'used', whole(seed))
      keep(counter, counter.n)
      levels[i] = seed
    end
  end
end

local function has_room(i, counter, hits)
  if counter.k == 'bucket' then return levels[i] + hits * counter.p <= counter.b * counter.p end
  -- Any size passes below the share; what it is too much delays the next.
  if counter.k == 'backlog' then return levels[i] + counter.p <= counter.b * counter.p end
  return levels[i] + hits <= counter.a
end

local function judge(way)
  for i, counter in ipairs(demand.c) do
    if counter.e == 'refuse' and not has_room(i, counter, counter[way]) then return false end
  end
  return true
end

local function answer(verdict)
  local said = { verdict, whole(now) }
  for i in ipairs(demand.c) do
    said[#said + 1] = exact(levels[i])
    said[#said + 1] = rooms[i] == false and 0 or 1
    said[#said + 1] = exact(waits[i] or 0)
  end
  return said
end

-- Asked again (a call that was repeated): the same answer, and nothing more is taken.
local known = demand.s and redis.call('GET', KEYS[1])
if known and known ~= '' then return answer(tonumber(string.sub(known, 1, 1))) end

local verdict, way = 1, 'f'
if not judge('f') then
  verdict, way = 2, 'l'
  if not judge('l') then return answer(0) end
end

local taken = ''
for i, counter in ipairs(demand.c) do
  local hits = counter[way]
  rooms[i] = has_room(i, counter, hits)
  local takes = rooms[i] or counter.e ~= 'shadow'
  taken = taken .. (takes and 1 or 0)
  if takes then
    if counter.k == 'bucket' then
      levels[i] = levels[i] + hits * counter.p
      put_debt(counter, levels[i], now)
    elseif counter.k == 'leases' then
      levels[i] = levels[i] + 1
      redis.call('ZADD', counter.n, whole(now + demand.d), demand.r)
      redis.call('PEXPIRE', counter.n, whole(demand.d / 1000 + 1000))
    elseif counter.k == 'slots' then
      take_slot(counter, demand.t, demand.r, now, demand.d)
    elseif counter.k == 'backlog' then
      add_backlog(counter, demand.t, hits, now)
    else
      levels[i] = levels[i] + hits
      redis.call('HINCRBY', counter.n, 'held', whole(hits))
      redis.call('ZADD', counter.n .. ':held', whole(now + demand.d), whole(hits) .. ':' .. demand.r)
      keep(counter, counter.n)
      keep(counter, counter.n .. ':held')
    end
  end
end
if demand.s then
  -- The demand as it came: encoding it again would round its numbers to 14 digits.
  redis.call('SET', KEYS[1], verdict .. taken .. ARGV[1], 'PX', whole(demand.d / 1000))
  redis.call('ZADD', KEYS[2], whole(now), demand.r)
  redis.call('PEXPIRE', KEYS[2], whole(demand.d / 1000 + 1000))
end
return answer(verdict)
