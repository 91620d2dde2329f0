"""Starts a deployment, watches it and ends it: processes on this machine, or workers as actors on a Ray cluster.

    routers up (their control addresses are known) -> workers up -> every router is ready -> announced
    -> children that end or hang are started again; restart: one after the other, while the others serve
    -> routers ask for more or fewer workers: started, or drained and ended
    -> stop, drain: all of them are gone when `run` returns

Routers are local children in both cases. A worker does the same work under both launchers, and no request ever
passes through here. Ray is imported in `on_ray` and `ray_calls` alone, inside what needs it.
"""
