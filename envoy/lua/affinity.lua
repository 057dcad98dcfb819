-- SPDX-License-Identifier: Apache-2.0
-- Turn the beginning of a prompt into a number: equal for prompts that begin alike, so that they go to the
-- server that has that beginning in its cache. Not a secret's hash: it never leaves Envoy. Pure.

local byte, min = string.byte, math.min

local M = {}

-- Of body[from ..], at most `most` bytes, as text.
function M.prefix(body, from, most)
  local number = 5381
  for i = from, min(#body, from + most - 1) do
    number = (number * 33 + byte(body, i)) % 4294967296
  end
  return string.format('%d', number)
end

return M
