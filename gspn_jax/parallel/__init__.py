"""Many devices and hosts: mesh, sharding of parameters, FSDP, agreement between hosts."""
