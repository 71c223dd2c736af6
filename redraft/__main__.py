from redraft.cli.main import main

main()
