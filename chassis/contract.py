# SPDX-License-Identifier: Apache-2.0
"""
Spell every name that crosses a process boundary, once.

Envoy's configuration (`envoy/`) and the services share these names, not calls.
A house test looks for each of them in `envoy/`; nothing else may spell them again.
"""

from __future__ import annotations

from typing import Final

# --- Headers -----------------------------------------------------------------

#: Every header with this prefix is ours; Envoy strips it from a client's request before any filter reads it.
OWN_HEADER_PREFIX: Final = "x-peaje-"
#: Minted by Envoy for each request; a client's own value is dropped (it must never choose a billing id).
REQUEST_ID_HEADER: Final = "x-request-id"
#: Anthropic-style clients send their key here; OpenAI-style ones send `authorization: Bearer`.
API_KEY_HEADER: Final = "x-api-key"
#: Tells the model server's own scheduler whose request it is: the Gateway API Inference Extension's name.
#: Written by the route table with the tenant; a client's own value is dropped.
FAIRNESS_ID_HEADER: Final = "x-gateway-inference-fairness-id"
AUTHORIZATION_HEADER: Final = "authorization"

# --- Metadata namespaces (Envoy dynamic metadata) ------------------------------

#: Written by gate.lua from the request, read by extauth, the route table and the journal.
NS_REQUEST: Final = "peaje.request"
#: Written by tap.lua from the response, read by the settle descriptor and the journal.
NS_USAGE: Final = "peaje.usage"
#: Written by ext_authz from extauth's answer: who is calling.
NS_IDENTITY: Final = "envoy.filters.http.ext_authz"
#: Written by the ratelimit filter from the RLS answer: what was admitted.
NS_ADMISSION: Final = "envoy.filters.http.ratelimit"

# --- Keys inside peaje.request --------------------------------------------------

#: Seconds since 1970 with microseconds, as text: equal in every record of an exchange.
REQ_STARTED_AT: Final = "started_at"
REQ_DIALECT: Final = "dialect"
REQ_MODEL: Final = "model"
REQ_STREAM: Final = "stream"
REQ_PROMPT_BYTES: Final = "prompt_bytes"
REQ_OUTPUT_TOKENS_MAX: Final = "output_tokens_max"
REQ_CHOICES: Final = "choices"
#: How much is asked for of what the dialect is metered by besides tokens (`DIALECT_METERS`), as text; absent if it is not.
REQ_QUANTITY: Final = "quantity"
#: Who asks the engine for usage: "insert" or "replace" the tap, "service" metering/ by ext_proc, "no" nobody.
REQ_SHAPE: Final = "shape"
#: True when the caller itself asked for the usage frame; tap.lua hides it otherwise.
REQ_WANTS_USAGE: Final = "wants_usage"

#: Set by the gate to the request id: this worker remembers who is calling, so extauth is not asked.
REQ_RECOGNISED: Final = "recognised"
#: Set by the gate to the request id: it also may pass, so nobody is asked.
REQ_EXPRESS: Final = "express"
#: Set by the gate to the request id: what is answered will be remembered, if it may be.
REQ_ASKED: Final = "asked"
#: How many requests this worker would spend by itself; and, if a lease of its has ended, the lease's id
#: and the requests and tokens that were left of it (less than 0: a debt). One text, separated by spaces.
REQ_LEASE: Final = "lease"

#: Every URI and DNS name of the client certificate that Envoy has verified; absent without one.
REQ_CERTIFICATE_NAMES: Final = "certificate_names"

REQUEST_KEYS: Final = (
    REQ_STARTED_AT,
    REQ_DIALECT,
    REQ_MODEL,
    REQ_STREAM,
    REQ_PROMPT_BYTES,
    REQ_OUTPUT_TOKENS_MAX,
    REQ_CHOICES,
    REQ_QUANTITY,
    REQ_SHAPE,
    REQ_WANTS_USAGE,
    REQ_RECOGNISED,
    REQ_EXPRESS,
    REQ_ASKED,
    REQ_LEASE,
    REQ_CERTIFICATE_NAMES,
)

#: Written on each route, under the names of the filters that read it.
ROUTE_NAMESPACES: Final = ("gate", "tap")
#: Whether every engine that may answer sends running usage.
ROUTE_RUNNING_USAGE: Final = "running_usage"
#: On the routes of an alias: the model's own name, which the gate puts in its place.
ROUTE_MODEL: Final = "model"
#: How many bytes of the prompt decide which server it goes to; absent: none do.
ROUTE_PREFIX_BYTES: Final = "prefix_bytes"
#: The most that a caller may ask the engines to generate for one choice; absent: not known.
ROUTE_OUTPUT_TOKENS_MAX: Final = "output_tokens_max"
#: What OpenTelemetry's conventions call what the path does (gen_ai.operation.name), for spans.
ROUTE_OPERATION: Final = "operation"

#: Written on each endpoint of a model, under this namespace: its pool, the engine's kind, and what that calls the model.
POOL_NAMESPACE: Final = "peaje.pool"
POOL_NAME: Final = "name"
POOL_ENGINE: Final = "engine"
POOL_MODEL: Final = "model"

#: Never leave Envoy: the beginning of a prompt as a number, what the chosen server calls the model, its pool.
PREFIX_HEADER: Final = "x-peaje-prefix"
ENGINE_MODEL_HEADER: Final = "x-peaje-engine-model"
POOL_HEADER: Final = "x-peaje-pool"

# --- Endpoint picker (Gateway API Inference Extension, proposal 004): the protocol's own names ---------------

#: The filter in envoy.yaml that asks it; each route to a pool with one says whom.
PICKER_FILTER: Final = "picker"
#: Its answer: one server or several, in the order in which they are tried.
NS_PICKED: Final = "envoy.lb"
PICKED_ENDPOINT: Final = "x-gateway-destination-endpoint"
PICKED_KEYS: Final = (PICKED_ENDPOINT,)

# --- Load reports (ORCA) -------------------------------------------------------------------------------------

#: Asks an engine to report its load with its answer, in this format.
LOAD_FORMAT_HEADER: Final = "endpoint-load-metrics-format"
#: The report: for Envoy, never for callers.
LOAD_HEADER: Final = "endpoint-load-metrics"

# --- Keys inside the identity namespace (extauth's answer) ------------------------

ID_TENANT: Final = "tenant"
ID_PROJECT: Final = "project"
ID_KEY: Final = "key_id"
#: The body of GET /v1/models for this caller; tap.lua answers with it.
ID_MODELS_BODY: Final = "models_body"
#: How long Envoy may remember this decision for the same credential, dialect and model; 0: not at all.
ID_CACHE_MS: Final = "cache_ms"

# --- Keys inside the admission namespace (ratelimit's answer) ---------------------

ADM_ADMITTED: Final = "admitted"
ADM_RESERVED_TOKENS: Final = "reserved_tokens"
#: Output tokens per choice that were promised under a hard limit; absent if none binds. tap.lua
#: writes it into the upstream request.
ADM_OUTPUT_CAP: Final = "output_tokens_cap"
#: The status of a refusal when it is not 429; envoy.yaml maps it, because the filter has one status for all.
ADM_REFUSED_STATUS: Final = "refused_status"
#: Whether there is something to settle; carried back by the settle descriptor.
ADM_HOLD: Final = "hold"
HOLD_SOMETHING: Final = "yes"
HOLD_NOTHING: Final = "no"
#: The request id, where only a slice of the answer is held: metering counts what is delivered, has more
#: held in time, and ends the stream when there is no more. Envoy asks it by the presence of this key.
ADM_SLICE: Final = "slice"
#: Output tokens of that slice, of all choices together.
ADM_SLICE_TOKENS: Final = "slice_tokens"
#: True where no limit applies: Envoy need not ask again while it remembers the identity.
ADM_UNLIMITED: Final = "unlimited"
#: What was taken in advance for this worker to spend by itself. No tokens: no limit counts them.
ADM_LEASE_REQUESTS: Final = "lease_requests"
ADM_LEASE_TOKENS: Final = "lease_tokens"
#: What to charge a lease with: prompt tokens of this very request, output tokens per choice at the most.
ADM_LEASE_INPUT: Final = "lease_input"
ADM_LEASE_OUTPUT: Final = "lease_output"
#: Of a lease of quotas: the most that a request which passes on it may have, bytes of prompt and output tokens of all
#: choices, and what the model server is held to for each choice. Absent: it is not bounded by that.
ADM_LEASE_PROMPT_BYTES: Final = "lease_prompt_bytes"
ADM_LEASE_OUTPUT_MAX: Final = "lease_output_max"
ADM_LEASE_CAP: Final = "lease_cap"
#: The id of the lease of quotas that a request passed on, a request id; absent otherwise. The ledger sums up by it.
ADM_LEASE: Final = "lease"

# --- Keys inside peaje.usage --------------------------------------------------------

USE_INPUT: Final = "input"
USE_OUTPUT: Final = "output"
USE_CACHED: Final = "cached"
USE_REASONING: Final = "reasoning"
#: How much was delivered of what the dialect is metered by besides tokens; absent if nobody has said.
USE_QUANTITY: Final = "quantity"
#: input + output as last seen: the hits addend of the settle call.
USE_TOTAL: Final = "total"
#: "final" once the engine's closing usage was read, "running" before that, "none" until any was.
USE_SEEN: Final = "seen"
#: Frames that carried generated content; what `estimated` rests on when the engine never said.
USE_FRAMES: Final = "frames"
#: A short machine word when the tap could not read something (e.g. "encoded", "event_too_large", "invalid").
USE_ANOMALY: Final = "anomaly"

#: Written by metering when it ended a stream, not by the tap: how it knows what was delivered, a `basis`.
USE_STOPPED: Final = "stopped"

USAGE_KEYS: Final = (
    USE_INPUT,
    USE_OUTPUT,
    USE_CACHED,
    USE_REASONING,
    USE_QUANTITY,
    USE_TOTAL,
    USE_SEEN,
    USE_FRAMES,
    USE_ANOMALY,
)

# --- Rate limit descriptors ------------------------------------------------------------

RLS_DOMAIN: Final = "peaje"
DESC_PHASE: Final = "phase"
PHASE_ADMIT: Final = "admit"
PHASE_SETTLE: Final = "settle"
#: From metering, not from Envoy: hold the next slice of a stream. Input and output say what was delivered.
PHASE_RENEW: Final = "renew"
DESC_REQUEST_ID: Final = "request_id"
DESC_TENANT: Final = "tenant"
DESC_PROJECT: Final = "project"
DESC_KEY: Final = "key_id"
DESC_MODEL: Final = "model"
DESC_DIALECT: Final = "dialect"
DESC_PROMPT_BYTES: Final = "prompt_bytes"
DESC_OUTPUT_TOKENS_MAX: Final = "output_tokens_max"
DESC_CHOICES: Final = "choices"
DESC_QUANTITY: Final = "quantity"
#: "yes" if the answer is to be streamed.
DESC_STREAM: Final = "stream"
DESC_LEASE: Final = "lease"
#: What Envoy sends for a descriptor entry whose metadata is missing. Never a valid tenant.
DESC_ABSENT: Final = "-"

ADMIT_KEYS: Final = (
    DESC_PHASE,
    DESC_REQUEST_ID,
    DESC_TENANT,
    DESC_PROJECT,
    DESC_KEY,
    DESC_MODEL,
    DESC_DIALECT,
    DESC_PROMPT_BYTES,
    DESC_OUTPUT_TOKENS_MAX,
    DESC_CHOICES,
    DESC_STREAM,
    DESC_QUANTITY,
    DESC_LEASE,
)
#: Present only if the request reached the tap; Envoy drops the descriptor (and the call) otherwise.
DESC_SEEN: Final = "seen"
DESC_INPUT: Final = "input"
DESC_OUTPUT: Final = "output"
DESC_CACHED: Final = "cached"
DESC_REASONING: Final = "reasoning"
DESC_FRAMES: Final = "frames"
DESC_HOLD: Final = "hold"
SETTLE_KEYS: Final = (
    DESC_PHASE,
    DESC_REQUEST_ID,
    DESC_TENANT,
    DESC_MODEL,
    DESC_PROMPT_BYTES,
    DESC_HOLD,
    DESC_INPUT,
    DESC_OUTPUT,
    DESC_CACHED,
    DESC_REASONING,
    DESC_QUANTITY,
    DESC_FRAMES,
    DESC_SEEN,
)

# --- Journal -----------------------------------------------------------------------------

#: Record types. The start record is written by tap.lua as the request goes to a model server,
#: with the identity in it; the others are Envoy's own access log types.
JOURNAL_START: Final = "Start"
JOURNAL_PERIODIC: Final = "DownstreamPeriodic"
JOURNAL_END: Final = "DownstreamEnd"

J_TYPE: Final = "type"
J_REQUEST_ID: Final = "request_id"
J_STARTED_AT: Final = "started_at"
J_DURATION_MS: Final = "duration_ms"
J_STATUS: Final = "status"
J_FLAGS: Final = "flags"
J_DETAILS: Final = "details"
J_PATH: Final = "path"
J_UPSTREAM: Final = "upstream"
J_BYTES_SENT: Final = "bytes_sent"
J_IDENTITY: Final = "identity"
J_REQUEST: Final = "request"
J_USAGE: Final = "usage"
J_ADMISSION: Final = "admission"
#: The kind of the engine that answered, from its endpoint's metadata: a row must not change when models.yaml does.
J_ENGINE: Final = "engine"
#: Names one life of one Envoy process; set by whoever starts Envoy.
J_EPOCH: Final = "epoch"
#: Microseconds, by Envoy's own clock, for who watches and never for a bill: from the last byte of the request to the
#: first one that the model server is sent; to the first byte of the answer's body; from that to the answer's last byte.
J_ADDED_US: Final = "added_us"
J_FIRST_BYTE_US: Final = "first_byte_us"
J_ANSWER_US: Final = "answer_us"
#: W3C's traceparent as the model server was sent it; only where traces are on (envoy/tracing.yaml).
J_TRACE: Final = "trace"
EPOCH_ENVIRONMENT: Final = "PEAJE_ENVOY_EPOCH"
#: A life that took over from another while that still served is called as the first of them, with this and its number.
EPOCH_HEIR: Final = "~"
#: The same, as Envoy sends it with each call to ratelimit.
EPOCH_CALL_METADATA: Final = "x-peaje-envoy-epoch"
#: The client's address, as Envoy tells extauth with each call: behind proxies that it trusts not its own peer's.
ADDRESS_CALL_METADATA: Final = "x-peaje-address"
#: "off" in Envoy's environment: the gate asks for every request.
EXPRESS_ENVIRONMENT: Final = "PEAJE_EXPRESS"

JOURNAL_KEYS: Final = (
    J_TRACE,
    J_TYPE,
    J_REQUEST_ID,
    J_STARTED_AT,
    J_DURATION_MS,
    J_STATUS,
    J_FLAGS,
    J_DETAILS,
    J_PATH,
    J_UPSTREAM,
    J_BYTES_SENT,
    J_IDENTITY,
    J_REQUEST,
    J_USAGE,
    J_ADMISSION,
    J_ADDED_US,
    J_FIRST_BYTE_US,
    J_ANSWER_US,
    J_ENGINE,
    J_EPOCH,
)

# --- Clusters and sockets ---------------------------------------------------------------------

#: Envoy cluster name of each service; also the stem of its Unix socket under `run/`.
CLUSTER_EXTAUTH: Final = "extauth"
CLUSTER_RATELIMIT: Final = "ratelimit"
CLUSTER_METERING: Final = "metering"
#: Paths are relative to the state directory, which is every process's working
#: directory: a Unix socket path holds 107 bytes, a state directory may be longer.
SOCKETS: Final = {
    CLUSTER_EXTAUTH: "run/extauth.sock",
    CLUSTER_RATELIMIT: "run/ratelimit.sock",
    CLUSTER_METERING: "run/metering.sock",
}
#: Written by the beacon, read by the gate: who changed since when.
CHANGES_PATH: Final = "run/changes"
#: Envoy's own records. It flushes them in slices, so nobody else may write to this file.
JOURNAL_PATH: Final = "journal/journal.jsonl"
#: The start records, beside Envoy's: one write(2) each.
STARTS_PATH: Final = "journal/starts.jsonl"
#: While this file exists the tap admits nothing: the collector makes it when the journal's disk is nearly full.
JOURNAL_CLOSED_PATH: Final = "journal/closed"
MODELS_PATH: Final = "envoy/models.yaml"
#: Directory. Which models document each process serves (chassis/marks.py); `apply` waits for all of them.
MODELS_READ_PATH: Final = "run/models-read"
#: Who else than a key may call: issuers of tokens, client certificates, attribute policies.
IDENTITY_PATH: Final = "identity.yaml"
#: Audience of the tokens that the control API mints for service accounts.
SERVICE_ACCOUNT_AUDIENCE: Final = "peaje"

# --- Dialects: path → how the request and the answer are read -----------------------------------

PATHS: Final = {
    "/v1/chat/completions": "openai.chat",
    "/v1/completions": "openai.completions",
    "/v1/embeddings": "openai.embeddings",
    "/v1/responses": "openai.responses",
    "/v1/messages": "anthropic.messages",
    "/v1/models": "openai.models",
    "/v1/rerank": "rerank",
    "/v1/images/generations": "openai.images",
    "/v1/audio/speech": "openai.speech",
}

#: What is counted besides tokens, or instead of them: dialect → its meter. Each is a whole number: images that were
#: delivered, characters (code points) of the text that was spoken, searches of up to a hundred documents.
DIALECT_METERS: Final = {
    "openai.images": "images",
    "openai.speech": "characters",
    "rerank": "searches",
}
METERS: Final = tuple(sorted(DIALECT_METERS.values()))

#: What a credential may be limited to: dialect → the scope that it needs.
DIALECT_SCOPES: Final = {
    "openai.chat": "inference",
    "openai.completions": "inference",
    "openai.responses": "inference",
    "anthropic.messages": "inference",
    "openai.embeddings": "embeddings",
    "openai.models": "models",
    "rerank": "rerank",
    "openai.images": "images",
    "openai.speech": "speech",
}
SCOPES: Final = tuple(sorted(set(DIALECT_SCOPES.values())))

# --- Error codes: the closed list of what a caller may read in `error.code` ------------------------

ERROR_CODES: Final = (
    "missing_credential",
    "invalid_api_key",
    "invalid_token",
    "unknown_certificate",
    "conflicting_credentials",
    "key_disabled",
    "service_account_suspended",
    "project_suspended",
    "tenant_not_allowed",
    "address_not_allowed",
    "scope_not_allowed",
    "policy_denied",
    "model_not_allowed",
    "model_not_found",
    "tenant_suspended",
    "invalid_request",
    "unsupported_encoding",
    "request_too_large",
    "request_timeout",
    "not_found",
    "rate_limit_exceeded",
    "fair_share",
    "too_many_unknown_credentials",
    "insufficient_quota",
    "upstream_unavailable",
    "upstream_timeout",
    "service_unavailable",
)
