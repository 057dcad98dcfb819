-- SPDX-License-Identifier: Apache-2.0
-- Add hits to the counters of generic rules, each in the window that the store's own time is in.
-- KEYS     the counters; one that is there twice is counted twice
-- ARGV     per counter: the window's length in seconds, the hits (less than 0: given back; 0: only looked at)
-- Answer: {now in seconds, then per counter its count before and after}
--
-- A counter is the text "WINDOW COUNT", where WINDOW is the second in which its window began. A count
-- of another window is none: after a clock that jumped, either way, the window begins anew. What is
-- there and is no counter (a damaged key) is none too, and is written over.
local COUNT_MAX = 9007199254740991

local now = tonumber(redis.call('TIME')[1])
local said = { now }
for i, key in ipairs(KEYS) do
  local length, hits = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local passed = now % length
  local stored = redis.pcall('GET', key)
  local of, count = string.match(type(stored) == 'string' and stored or '', '^(%d+) (%d+)$')
  local before = tonumber(of) == now - passed and tonumber(count) or 0
  local after = math.max(0, math.min(before + hits, COUNT_MAX))
  if hits ~= 0 then
    -- A second longer than the window: the store forgets by milliseconds, the window ends with a second.
    redis.call('SET', key, string.format('%.0f %.0f', now - passed, after), 'PX', (length - passed + 1) * 1000)
  end
  said[2 * i], said[2 * i + 1] = before, after
end
return said
