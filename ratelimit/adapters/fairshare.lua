-- SPDX-License-Identifier: Apache-2.0
-- Shared by admit.lua and settle.lua, after counters.lua: a fair share of a pool of model servers.
-- The arithmetic, and why, is in ratelimit/core/fairshare.py.
--
--   slots     sorted set NAME of "tenant/request" by end; hash NAME:by {W, n:TENANT, w:TENANT}:
--             the sum of weights, and how many requests of which weight each tenant has under way
--   backlog   hash NAME {at, v, total, W, w:TENANT}; sorted set NAME:ends of tenants by the
--             virtual time at which they are through
--
-- Such a counter in a demand also has w, the tenant's weight.

local LEASE_WAIT_US = 1000000

local function seen(total, mine, share, capacity)
  return math.min(total, mine + capacity - share)
end

local function leave_slot(counter, member)
  if redis.call('ZREM', counter.n, member) == 0 then return end
  -- Up to the last slash: a request's id, which Envoy mints, has none.
  local by, tenant = counter.n .. ':by', string.match(member, '^(.*)/')
  if redis.call('HINCRBY', by, 'n:' .. tenant, -1) > 0 then return end
  local weight = redis.call('HGET', by, 'w:' .. tenant) or '0'
  redis.call('HINCRBY', by, 'W', '-' .. weight)
  redis.call('HDEL', by, 'n:' .. tenant, 'w:' .. tenant)
end

-- The level as *tenant* sees it, and how long to wait for room.
local function slots_of(counter, tenant, now)
  local over = redis.call('ZRANGEBYSCORE', counter.n, '-inf', whole(now), 'LIMIT', 0, PURGED_MAX)
  for _, member in ipairs(over) do leave_slot(counter, member) end
  local total = redis.call('ZCARD', counter.n)
  local stored = redis.call('HMGET', counter.n .. ':by', 'n:' .. tenant, 'w:' .. tenant, 'W')
  local weights = tonumber(stored[3] or '0') - tonumber(stored[2] or '0') + counter.w
  local share = math.max(1, counter.a * counter.w / weights)
  -- Nor more than twice the slots, however many newcomers there are.
  return math.max(seen(total, tonumber(stored[1] or '0'), share, counter.a), total - counter.a), LEASE_WAIT_US
end

local function take_slot(counter, tenant, request, now, lease)
  local by = counter.n .. ':by'
  local before = tonumber(redis.call('HGET', by, 'w:' .. tenant) or '0')
  redis.call('ZADD', counter.n, whole(now + lease), tenant .. '/' .. request)
  redis.call('HINCRBY', by, 'n:' .. tenant, 1)
  redis.call('HINCRBY', by, 'W', whole(counter.w - before))
  redis.call('HSET', by, 'w:' .. tenant, whole(counter.w))
  redis.call('PEXPIRE', counter.n, whole(lease / 1000 + 1000))
  redis.call('PEXPIRE', by, whole(lease / 1000 + 1000))
end

local function write_backlog(counter, pool)
  local ends = counter.n .. ':ends'
  if pool.weight <= 0 then
    redis.call('DEL', counter.n, ends)
    return
  end
  redis.call('HSET', counter.n, 'at', exact(pool.at), 'v', exact(pool.v), 'total', exact(pool.total), 'W', whole(pool.weight))
  local life = whole(math.min(math.ceil(pool.total / counter.a / 1000) + 60000, DAYS_400_MS))
  redis.call('PEXPIRE', counter.n, life)
  redis.call('PEXPIRE', ends, life)
end

-- The backlog drained until now, with what *tenant* has in it.
local function backlog(counter, tenant, now)
  local ends = counter.n .. ':ends'
  local stored = redis.call('HMGET', counter.n, 'at', 'v', 'total', 'W')
  local pool = { at = now, v = tonumber(stored[2] or '0'), total = tonumber(stored[3] or '0'), weight = tonumber(stored[4] or '0') }
  local passed = now - tonumber(stored[1] or whole(now))
  -- A clock that went back drains nothing, and counts from what it shows now.
  local left = math.max(0, passed) * counter.a
  pool.total = math.max(0, pool.total - left)
  for _ = 1, PURGED_MAX do
    if pool.weight <= 0 or left <= 0 then break end
    local first = redis.call('ZRANGE', ends, 0, 0, 'WITHSCORES')
    if not first[1] then
      pool.weight = 0
      break
    end
    local needed = (tonumber(first[2]) - pool.v) * pool.weight
    if needed > left then
      pool.v, left = pool.v + left / pool.weight, 0
      break
    end
    left, pool.v = left - needed, tonumber(first[2])
    pool.weight = pool.weight - tonumber(redis.call('HGET', counter.n, 'w:' .. first[1]) or '0')
    redis.call('ZREM', ends, first[1])
    redis.call('HDEL', counter.n, 'w:' .. first[1])
  end
  if pool.weight <= 0 then
    pool.v, pool.total = 0, 0
  elseif left > 0 then
    -- More tenants were through than one call looks at: the rest of the time is the next one's.
    pool.at, pool.total = now - left / counter.a, pool.total + left
  end
  write_backlog(counter, pool)
  local finish = redis.call('ZSCORE', ends, tenant)
  pool.mine_weight = finish and tonumber(redis.call('HGET', counter.n, 'w:' .. tenant)) or 0
  pool.mine = finish and (tonumber(finish) - pool.v) * pool.mine_weight or 0
  return pool
end

local function backlog_of(counter, tenant, now)
  local pool = backlog(counter, tenant, now)
  local capacity, one = counter.b * counter.p, counter.p
  local part = counter.w / (pool.weight - pool.mine_weight + counter.w)
  local share = math.max(one, capacity * part)
  return seen(pool.total, pool.mine, share, capacity), math.max(0, (pool.mine + one - share) / (counter.a * part))
end

local function add_backlog(counter, tenant, hits, now)
  local pool, ends = backlog(counter, tenant, now), counter.n .. ':ends'
  local after = math.max(0, pool.mine + hits * counter.p)
  pool.total = math.max(0, pool.total + after - pool.mine)
  pool.weight = pool.weight - pool.mine_weight
  if after > 0 then
    pool.weight = pool.weight + counter.w
    redis.call('ZADD', ends, exact(pool.v + after / counter.w), tenant)
    redis.call('HSET', counter.n, 'w:' .. tenant, whole(counter.w))
  else
    redis.call('ZREM', ends, tenant)
    redis.call('HDEL', counter.n, 'w:' .. tenant)
  end
  write_backlog(counter, pool)
end
