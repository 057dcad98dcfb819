-- SPDX-License-Identifier: Apache-2.0
-- Take all that one request asks, or nothing, and note what was taken.
-- KEYS     every key that may be touched, all with the tenant's hash tag: the reservation, the index
--          of open reservations, the counters
-- ARGV[1]  the demand as JSON: t tenant, r request, e the life of its Envoy, s whether it settles, d lease in microseconds,
--          in estimated input tokens, q how much of what else is metered, o output tokens of all choices together
--          {least, lean, full}, w how many times over the full ask has to fit into a hard counter to be taken, c counters; and of what Envoy's
--          workers spend by themselves: b a lease that is given back (i its id, n requests and t tokens that
--          are left), g one that is asked for (i, n, t each token, d its length in microseconds; of quotas: e what a
--          request on it takes of each counter, r its own reservation, x the index of those, w the reservation's text,
--          h for how long it is held)
-- ARGV[2]  JSON: counter name -> used, from the ledger, for quotas that the store knows nothing of
-- Answer: {verdict, now, requests of the lease that was given, else 0, output tokens granted, then per counter its level, what
--         of that is held, 1 if it had room, else 0, and for a fair share the wait}
--         verdict 0 refused, 1 full, 2 lean, -1 a quota is not known and no seed was given
local demand, seeds = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local now = clock()
local levels, helds, lents, rooms, waits, given = {}, {}, {}, {}, {}, 0

local function in_unit(counter, lease) return counter.u == 'requests' and lease.n or lease.t end

-- A lease holds at most this part of what is left of a quota, and is of no use below so many requests.
local PART, LEAST = 20, 2

-- What was spent of a lease stays, as of now; a lease that is not there was ended or given back before.
if demand.b then
  for _, counter in ipairs(demand.c) do
    local hits = counter.k == 'bucket' and redis.call('HGET', counter.n, 'l:' .. demand.b.i)
    if hits then
      local debt = debt_of(counter, now)
      -- It may just have ended.
      if redis.call('HDEL', counter.n, 'l:' .. demand.b.i) == 1 then
        redis.call('ZREM', counter.n .. ':leases', demand.b.i)
        leased[counter.n] = leased[counter.n] - hits * counter.p
        redis.call('HINCRBY', counter.n, 'leased', whole(-hits))
        put_debt(counter, debt - math.min(in_unit(counter, demand.b), hits) * counter.p, now)
      end
    end
  end
end

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
    levels[i], helds[i], lents[i] = quota_of(counter, now)
    if not levels[i] then
      local seed = seeds[counter.n]
      if not seed then return { -1, whole(now), 0 } end
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

-- Hits that each counter is asked for: all of the full ask, or the lean one with so many output tokens.
local function asked(counter, output)
  return output and lean_hits(demand, counter, output, demand['in']) or counter.f
end

local function fits(output)
  for i, counter in ipairs(demand.c) do
    local times = not output and is_hard(counter) and demand.w or 1
    if counter.e == 'refuse' and not has_room(i, counter, asked(counter, output) * times) then return false end
  end
  return true
end

local function answer(verdict, output)
  local said = { verdict, whole(now), given, whole(output) }
  for i in ipairs(demand.c) do
    said[#said + 1] = exact(levels[i])
    said[#said + 1] = whole(helds[i] or 0)
    said[#said + 1] = rooms[i] == false and 0 or 1
    said[#said + 1] = exact(waits[i] or 0)
  end
  return said
end

-- Requests that a lease may have: of a bucket so many that at least half of it is left to those who ask, of a quota a
-- part of what is left, and none unless all leases together leave half of that.
local function lendable(wanted)
  local n, one = wanted, { n = 1, t = demand.g.t }
  for i, counter in ipairs(demand.c) do
    if counter.k == 'bucket' then
      n = math.min(n, math.floor((counter.b * counter.p / 2 - levels[i]) / math.max(in_unit(counter, one) * counter.p, 1)))
    elseif is_hard(counter) and demand.g.e[i] > 0 then
      n = math.min(n, math.floor(math.max(0, counter.a - levels[i]) / PART / demand.g.e[i]))
    end
  end
  if n < wanted and n < LEAST then return 0 end
  for i, counter in ipairs(demand.c) do
    if is_hard(counter) and (lents[i] + n * demand.g.e[i]) * 2 > counter.a - levels[i] + lents[i] then return 0 end
  end
  return n
end

-- Held at its worst until the ledger says what it was spent on: it has a reservation of its own.
local function hold(n)
  for i, counter in ipairs(demand.c) do
    if counter.k == 'quota' then
      local hits = n * demand.g.e[i]
      levels[i], helds[i] = levels[i] + hits, (helds[i] or 0) + hits
      redis.call('HINCRBY', counter.n, 'held', whole(hits))
      redis.call('HINCRBY', counter.n, 'lent', whole(hits))
      redis.call('ZADD', counter.n .. ':held', whole(now + demand.g.h), member(hits, lent_name(demand.g.i)))
      keep(counter, counter.n)
      keep(counter, counter.n .. ':held')
    end
  end
  redis.call('SET', demand.g.r, '2=' .. whole(n) .. ',0' .. demand.g.w, 'PX', whole(demand.g.h / 1000))
  redis.call('ZADD', demand.g.x, whole(now), demand.g.i)
  redis.call('PEXPIRE', demand.g.x, whole(demand.g.h / 1000 + 1000))
end

local function lease()
  local n = lendable(demand.g.n)
  if n < 1 then return 0 end
  local part = { n = n, t = n * demand.g.t }
  for i, counter in ipairs(demand.c) do
    if counter.k == 'bucket' then
      local hits = in_unit(counter, part)
      levels[i] = levels[i] + hits * counter.p
      leased[counter.n] = leased[counter.n] + hits * counter.p
      redis.call('HINCRBY', counter.n, 'leased', whole(hits))
      redis.call('HSET', counter.n, 'l:' .. demand.g.i, whole(hits))
      redis.call('ZADD', counter.n .. ':leases', whole(now + demand.g.d), demand.g.i)
      put_debt(counter, levels[i], now)
    end
  end
  if demand.g.e then hold(n) end
  return n
end

-- Asked again (a call that was repeated): the same answer, and nothing more is taken.
local known = demand.s and redis.call('GET', KEYS[1])
if known and known ~= '' then
  local reservation = reservation_of(known)
  return answer(reservation.verdict, reservation.verdict == 1 and demand.o[3] or reservation.output)
end

local verdict, output = 1, nil
if not fits(nil) then
  verdict, output = 2, most_that_fits(demand.o[1], demand.o[2], fits)
  if not output then return answer(0, 0) end
end

local taken = ''
for i, counter in ipairs(demand.c) do
  local hits = asked(counter, output)
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
      redis.call('ZADD', counter.n .. ':held', whole(now + demand.d), member(hits, demand.r))
      keep(counter, counter.n)
      keep(counter, counter.n .. ':held')
    end
  end
end
if demand.s then
  put_reservation(KEYS[1], {
    verdict = verdict, taken = taken, text = ARGV[1], demand = demand, output = output, input = demand['in'],
  })
  redis.call('ZADD', KEYS[2], whole(now), demand.r)
  redis.call('PEXPIRE', KEYS[2], whole(demand.d / 1000 + 1000))
end
if demand.g then given = lease() end
return answer(verdict, output or demand.o[3])
