from gspn_jax.convert import main

main()
