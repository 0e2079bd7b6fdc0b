"""Token mixers: one file a system. Each file ends by registering its system, which is all that is needed to add one."""
