"""The invariants by name, and what a violation is.

Those that are missing follow from others here: I4, about readers of remote memory, is F1 and F2; I14 is H2, since
tags are the tenant's own; H7 is I6 and I7; H9 is H3, since only reservations take blocks into quarantine.
"""

from __future__ import annotations

INVARIANTS = {
    "I1": "blocks are conserved: free + cached + owned + quarantined = all",
    "I2": "a block's reference count is the number of holders that name it",
    "I3": "a block has one writer; what is published does not change",
    "I5": "a lease ends, once, and in time",
    "I6": "tokens per choice: 0, 1, 2, ... once each, the right ones, nothing after the finish reason",
    "I7": "only messages of the current attempt change a request",
    "I8": "every request reaches exactly one terminal state",
    "I9": "what is counted is what was delivered",
    "I10": "no work is handed out after the deadline",
    "I11": "attempts are bounded",
    "I12": "a draining worker gets nothing new, and drains to its end",
    "I13": "no queue and no book exceeds its bound",
    "I15": "quiescence: nothing is held when nothing runs",
    "I16": "liveness: after the last fault everything ends in 35 s",
    "I17": "determinism: the same seed gives the same events",
    "I18": "a worker begins work of its active role alone",
    "I19": "a role change drops nothing that was started",
    "I20": "work goes to workers that have told the role that it needs",
    "I21": "log-probabilities of prompt tokens: each once, the right ones, all of them",
    "I22": "an embedding is that of the prompt's tokens, and no token comes with it",
    "H1": "a write lands only in blocks of its own grant, while that is open or doomed",
    "H2": "what is adopted and read is what the sender wrote",
    "H3": "no block of an open or doomed reservation is free, cached or owned by another",
    "H4": "a grant is opened by one open_id at most, and ends once",
    "H5": "the hit blocks of a live reservation are held",
    "H6": "a published block is never written again",
    "H8": "liveness of handoffs: reservations are released, shipments end",
    "H10": "what lands of a page belongs to the same heads' keys or values on both sides",
    "H11": "what is adopted was told, for each head, by the rank that has it to the rank that gets it",
    "F1": "a read lands only in blocks that its fetch holds",
    "F2": "a block hash has one content, in every tier of every worker",
    "F3": "a prompt waits for a fetch no longer than its router allows, and for no part beyond its lease",
    "F4": "what a fetch publishes was lent when it was read",
    "F5": "what lay in a block before is copied out only while that is a sequence's, and not a remote writer's",
    "L1": "what a step computes of a request, it computes with the request's adapter",
    "G1": "what may come next in an answer is what its own grammar says there",
    "A1": "the autoscaler takes from no pool its last worker that takes work",
    "A2": "nobody is asked for twice: with those that were added a fleet is as large as was wanted",
    "crash": "no exception that is nobody's answer",
}


class Breach(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: str, text: str) -> None:
        assert invariant in INVARIANTS, invariant
        super().__init__(f"{invariant} ({INVARIANTS[invariant]}): {text}")
        self.invariant = invariant
        self.text = text
