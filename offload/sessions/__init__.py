"""Conversations that survive: the KV rows of computed tokens on disk, shared by prefix, and the sessions that refer to them.

geometry   what rows look like and where they lie in a file
sealed     small files that are read whole or refused
locking    who may append, who may remove
record     what is known of one segment: its tokens, and checksums of its rows
rows_file  the rows of one segment
catalog    the segments of one folder; which of them cover a sequence of tokens
chain      segments that are held open, one behind the other
reading    rows from disk, read ahead and verified
eviction   what goes first when the store is full
store      all of these as one
saved      sessions by name
manifest   a session as a file
"""
