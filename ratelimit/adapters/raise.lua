-- SPDX-License-Identifier: Apache-2.0
-- Let a quota have at least what the ledger says was used. One that the store does not know stays
-- unknown: it is seeded from the ledger when it is asked for. What is lent counts as used: the ledger may have it
-- already, and what came of it is added when the lease is repaid.
-- KEYS[1]  the quota     ARGV[1]  used, by the ledger
-- Answer: 1 if it was raised, else 0
local stored = redis.call('HMGET', KEYS[1], 'used', 'lent')
local spent = tonumber(ARGV[1]) - tonumber(stored[2] or '0')
if not stored[1] or tonumber(stored[1]) >= spent then return 0 end
redis.call('HSET', KEYS[1], 'used', string.format('%.0f', spent))
return 1
