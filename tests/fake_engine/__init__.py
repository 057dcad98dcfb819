# SPDX-License-Identifier: Apache-2.0
"""
A model server that writes down what it really produced.

It speaks HTTP in the shapes of vLLM, Dynamo and TensorRT-LLM, counts tokens by a rule anyone can
redo by hand (one word is one token), breaks in every way it is asked to, and keeps a log of the
truth against which the gateway's metering is measured. It knows nothing of the gateway.

    python -m tests.fake_engine --port 8001 --engine vllm --model tiny --truth /tmp/truth.jsonl

- `faults`  what a request may ask to go wrong
- `asks`    what a request wants, and how many tokens that is
- `kinds`   how each kind of engine spells its answers
- `truth`   the log, on disk before a client can know that its answer is complete
- `server`  HTTP/1.1, and the life of one exchange
"""
