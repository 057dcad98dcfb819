-- SPDX-License-Identifier: Apache-2.0
-- Take from all counters of one request or from none, and note what was taken.
-- The arithmetic is that of ratelimit/core/bucket.py. Redis 7.0 features only.
-- KEYS[1]      the reservation; KEYS[2..] the counters, all in one slot
-- ARGV[1]      how long an unsettled reservation is remembered, ms
-- ARGV[2]      what settle needs to know, stored as it is
-- ARGV[3..]    per counter: limit, period in microseconds, hits
-- Answer: {1 admitted | 0 refused, then the debt of each counter (after taking | as found)}
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local count = #KEYS - 1
local debts, fits = {}, true
for i = 1, count do
  local limit, period, hits = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  local stored = redis.call('HMGET', KEYS[i + 1], 'debt', 'at')
  local debt = 0
  if stored[1] then
    local elapsed = now - tonumber(stored[2])
    if elapsed < 0 then elapsed = 0 end
    debt = tonumber(stored[1]) - elapsed * limit
    if debt < 0 then debt = 0 end
  end
  debts[i] = debt
  if debt + hits * period > limit * period then fits = false end
end
local answer = { fits and 1 or 0 }
for i = 1, count do
  local limit, period, hits = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  if fits then
    debts[i] = debts[i] + hits * period
    -- Lua's own number format keeps 14 digits; a debt may need 17.
    redis.call('HSET', KEYS[i + 1], 'debt', string.format('%.17g', debts[i]), 'at', string.format('%.0f', now))
    redis.call('PEXPIRE', KEYS[i + 1], math.ceil(debts[i] / math.max(limit, 1) / 1000) + 1000)
  end
  answer[i + 1] = string.format('%.17g', debts[i])
end
if fits and ARGV[2] ~= '' then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
end
return answer
