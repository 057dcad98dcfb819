-- SPDX-License-Identifier: Apache-2.0
-- Say no in the caller's own dialect.

local quoted = require('envoy.lua.json').quoted

local M = {}

local TYPES = {
  [400] = 'invalid_request_error', [401] = 'authentication_error', [403] = 'permission_error',
  [404] = 'not_found_error', [405] = 'invalid_request_error', [413] = 'request_too_large',
  [415] = 'invalid_request_error', [429] = 'rate_limit_error', [503] = 'api_error',
}
local OPENAI_TYPES = { [404] = 'invalid_request_error', [413] = 'invalid_request_error' }

-- Headers and body of a refusal. denial: { status, code, message, param?, allow? }.
function M.refusal(dialect, denial, request_id)
  local headers = { [':status'] = tostring(denial.status), ['content-type'] = 'application/json' }
  if denial.status == 401 then headers['www-authenticate'] = 'Bearer realm="peaje"' end
  if denial.allow then headers['allow'] = denial.allow end
  local kind = TYPES[denial.status]
  if dialect == 'anthropic.messages' then
    return headers, table.concat({
      '{"type":"error","error":{"type":', quoted(kind), ',"code":', quoted(denial.code),
      ',"message":', quoted(denial.message), '},"request_id":', quoted(request_id), '}',
    })
  end
  return headers, table.concat({
    '{"error":{"message":', quoted(denial.message), ',"type":', quoted(OPENAI_TYPES[denial.status] or kind),
    ',"param":', denial.param and quoted(denial.param) or 'null', ',"code":', quoted(denial.code),
    ',"request_id":', quoted(request_id), '}}',
  })
end

return M
