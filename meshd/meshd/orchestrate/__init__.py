"""What happens between a question and its answer.

From an ask to its pieces: `mesh` (the service that edges use) makes a plan with `planner` and
`classifier`, `executor` runs its subtasks side by side, `router` gives each to a capability: of this
node, guarded by `host`, or of a peer, over `remote`. Who can do what is read from `catalogue`, which
events of the node core keep in step; `announcer` writes our own part of it. `records` and `wire` say how
all that looks in the store and between peers, `decoding` reads it with distrust, and `events` and
`service` are the vocabulary of the edges.

Two rules hold throughout. An answer is complete or it is an error: nothing here turns a stream that
broke into a finished answer. And what was asked is never logged: a line says who did what, how long it
took and how it ended.
"""
