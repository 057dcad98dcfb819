-- SPDX-License-Identifier: Apache-2.0
-- Replace what a request reserved by what it used. Once: the reservation goes with it.
-- KEYS[1]      the reservation; KEYS[2..] the counters it took tokens from, all in one slot
-- ARGV[1]      tokens used
-- ARGV[2..]    per counter: limit, period in microseconds, hits reserved
-- Answer: 1 settled | 0 there was nothing (settled before, or expired)
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for i = 1, #KEYS - 1 do
  local limit, period, hits = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  local stored = redis.call('HMGET', KEYS[i + 1], 'debt', 'at')
  local debt = 0
  if stored[1] then
    local elapsed = now - tonumber(stored[2])
    if elapsed < 0 then elapsed = 0 end
    debt = tonumber(stored[1]) - elapsed * limit
    if debt < 0 then debt = 0 end
  end
  debt = debt + (tonumber(ARGV[1]) - hits) * period
  if debt <= 0 then
    redis.call('DEL', KEYS[i + 1])
  else
    redis.call('HSET', KEYS[i + 1], 'debt', string.format('%.17g', debt), 'at', string.format('%.0f', now))
    redis.call('PEXPIRE', KEYS[i + 1], math.ceil(debt / math.max(limit, 1) / 1000) + 1000)
  end
end
return 1
