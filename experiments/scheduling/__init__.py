"""Many runs: on the slots of one machine, on the nodes of a Ray cluster, or shared by hosts."""
