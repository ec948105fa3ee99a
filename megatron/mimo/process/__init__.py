"""What a process of a job is to its launcher, its peers, its terminal and its run's files."""
