"""Every message that crosses a process border, typed and bounded, and the sealed frames that carry them.

    router <-> worker          tasks, results, workers: WorkerHello, WorkerStatus, ReserveKV ... StepTokens
    prefill <-> decode         handoff: KVOpen, KVRenew, KVClosed; answers KVOpened ... KVDone
    prefill -> decode          KVArrived: a notification of the transfer agent, with the data
    launcher <-> its children  lifeline: JSON, on a socket pair that nobody else holds

Durations only, never points in time. A message is about one (request, attempt), one grant or one open; the
receiver drops what names another.
"""
