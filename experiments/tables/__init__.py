"""Shows finished jobs: a page of tables and notes on the terminal, the same in files, and a picture."""
