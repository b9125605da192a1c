from timemix.cli import main

main()
