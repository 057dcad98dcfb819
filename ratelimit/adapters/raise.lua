-- SPDX-License-Identifier: Apache-2.0
-- Let a quota have at least what the ledger says was used. One that the store does not know stays
-- unknown: it is seeded from the ledger when it is asked for.
-- KEYS[1]  the quota     ARGV[1]  used, by the ledger
-- Answer: 1 if it was raised, else 0
local used = redis.call('HGET', KEYS[1], 'used')
if not used or tonumber(used) >= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'used', ARGV[1])
return 1
