"""What a process of a job is to its launcher, its terminal and its peers."""
