"""Moves KV from a prefill worker (sender) to a decode worker (receiver).

    offer, expect ─▶ HandoffReceiver ◀── segments over a link ── HandoffSender ◀─ open, push, finish
                          │ stage, check, scatter                      │ gather
                          ▼                                            ▼
                       KVStore                                      KVStore

Asking for a transfer, refusing it and cancelling it go over the workers' session; here only bytes
move. Per link there is one thread at each end, and a link that breaks fails its own transfers only.
"""
