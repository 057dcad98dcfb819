-- SPDX-License-Identifier: Apache-2.0
-- Images, characters, searches: what the other source says of them, and the ledger; null if one says nothing.
alter table reconciliation_exception
    add column quantity        bigint,
    add column ledger_quantity bigint;

create or replace view billing_reconciliation_v1 as
select exception_id, kind, request_id, started_at, tenant_id as tenant, state, input_tokens, output_tokens,
       ledger_tenant_id as ledger_tenant, ledger_input_tokens, ledger_output_tokens, found_at, note, actor, decided_at,
       quantity, ledger_quantity
from reconciliation_exception;
